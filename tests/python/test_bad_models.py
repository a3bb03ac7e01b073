"""What a user of the optimizers is told who makes a mistake, and that the ranks go on after it."""

import copy
import warnings

import pytest
from ranks import on_ranks, told

torch = pytest.importorskip("torch")

import bluefog.torch as bf  # noqa: E402

SIZE = 50_000


def goes_on():
    assert (bf.neighbor_allreduce(torch.ones(3)) == 1).all()
    bf.barrier()


def make(**options):
    bf.set_topology(bf.topology.ring(bf.size()))
    p = torch.nn.Parameter(torch.ones(SIZE))
    return p, bf.optim.DmSGD([("w", p)], lr=0.1, **options)


def steps(optimizer):
    """The sum over the ranks."""
    return bf.allreduce(torch.tensor(optimizer.param_groups[0]["step"]), average=False).item()


def forth(p, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()


@on_ranks(2)
def test_hyper_parameters_that_are_none():
    here = f"rank {bf.rank()}: dmsgd: "
    for value in (-1.0, float("nan"), float("inf"), None, "a"):
        for key in ("lr", "momentum", "weight_decay"):
            group = {"params": [torch.nn.Parameter(torch.ones(2))], key: value}
            if key == "momentum" and value is None:
                continue
            told(lambda g=group: make_groups([g]), here + key, repr(value), "finite number >= 0")
    p, optimizer = make()
    for value in (-1.0, float("nan"), None):
        # Between steps: nothing is begun, and with another value all goes on.
        optimizer.param_groups[0]["lr"] = value
        told(lambda: forth(p, optimizer), here + "lr", repr(value), "finite number >= 0")
        optimizer.param_groups[0]["lr"] = 0.1
        forth(p, optimizer)
        # In a step: it is completed with the values it began with.
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.param_groups[0]["lr"] = value
        told(optimizer.step, here, "lr of group 0", "'w'", "was 0.1", f"is {value}",
             kind=bf.BluefogError)  # fmt: skip
        optimizer.param_groups[0]["lr"] = 0.1
        forth(p, optimizer)
    told(lambda: optimizer.step(3), kind=TypeError)
    assert steps(optimizer) == 18


def make_groups(groups):
    return bf.optim.DmSGD(groups, lr=0.1)


@on_ranks(2)
def test_learning_rates_that_differ():
    p, optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.1 * (1 + bf.rank())
    told(
        lambda: forth(p, optimizer),
        "dmsgd, parameter 'w', step 0", "0.1 on rank 0", "0.2 on rank 1", "equal on all ranks",
    )  # fmt: skip
    goes_on()


@on_ranks(2)
def test_a_model_that_changes_under_the_engine():
    """After backward() parameters are the engine's; it never touches memory that is gone."""

    def replace(p):
        p.data = torch.zeros(SIZE)

    def write(p):
        with torch.no_grad():
            p.mul_(2)

    def convert(p):
        torch.nn.ParameterList([p]).to(torch.float64 if p.dtype is torch.float32 else torch.float32)

    def mean(p):
        with bf.consensus([p]):
            pass

    for change, text in (
        (replace, "replaced"), (write, "written to"), (convert, "replaced"), (mean, "written to"),
    ):  # fmt: skip
        p, optimizer = make()
        for _ in range(5):
            optimizer.zero_grad()
            p.square().sum().backward()
            change(p)
            junk = [torch.full((SIZE,), 7.0) for _ in range(4)]  # Takes memory that was freed.
            told(
                optimizer.step, f"rank {bf.rank()}: dmsgd", "parameter 'w'", text, "after step()",
                "overlap=False", kind=bf.BluefogError,
            )  # fmt: skip
            assert all((x == 7).all() for x in junk)
        forth(p, optimizer, 2)
        # Between steps, and without overlap, all of it is fine.
        change(p)
        forth(p, optimizer)
        p, optimizer = make(overlap=False)
        p.square().sum().backward()
        change(p)
        optimizer.step()
        assert torch.isfinite(p).all()
    # Parameters that share memory share their version too.
    flat = torch.ones(4)
    a, b = torch.nn.Parameter(flat[:2]), torch.nn.Parameter(flat[2:])
    optimizer = make_groups([{"params": [a, b]}])
    (3 * a.sum() + b.sum()).backward()
    optimizer.step()
    assert flat.tolist() == pytest.approx([0.7, 0.7, 0.9, 0.9])


@on_ranks(2)
def test_states_that_do_not_fit():
    p, optimizer = make()
    forth(p, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    texts = (f"rank {bf.rank()}: dmsgd", "'momentum_buffer' of parameter 'w'", "[3]", f"[{SIZE}]")
    bad = copy.deepcopy(good)
    bad["state"][0]["momentum_buffer"] = torch.zeros(3)
    told(lambda: optimizer.load_state_dict(bad), *texts)
    bad = copy.deepcopy(good)
    bad["param_groups"][0]["lr"] = -3.0
    told(lambda: optimizer.load_state_dict(bad), "lr is -3.0")
    forth(p, optimizer)  # Nothing of it was taken over.
    assert optimizer.param_groups[0]["lr"] == 0.1
    # Put there by hand: the step goes through, for the neighbours' sake, with a state of zeros.
    optimizer.state[p]["momentum_buffer"] = torch.zeros(3)
    told(lambda: forth(p, optimizer), *texts, "has been completed")
    forth(p, optimizer)
    optimizer.state[p]["momentum_buffer"] = "m"
    told(lambda: forth(p, optimizer), *texts[:2], "is a str")
    optimizer.state.clear()
    forth(p, optimizer)
    assert steps(optimizer) == 12


@on_ranks(2)
def test_parameters_of_different_number_and_kind():
    odd = bf.rank() == 1

    def param(*shape, requires_grad=True, **options):
        return torch.nn.Parameter(torch.ones(*shape, **options), requires_grad)

    def groups(names):
        return [{"params": [(name, param(2)) for name in names]}]

    def differ(names0, names1, *texts):
        told(lambda: make_groups(groups(names1 if odd else names0)), "do not agree", *texts)

    differ("ab", "abc", "2 parameters on rank 0, 3 on rank 1", "parameter 2 is missing on rank 0",
           "'c' float32[2] (group 0) on rank 1")  # fmt: skip
    differ("abc", "bc", "3 parameters on rank 0, 2 on rank 1", "parameter 0 is 'a'", "'b'")
    differ("ab", "ba", "parameter 0 is 'a' float32[2] (group 0) on rank 0 and 'b'")
    frozen = [("a", param(2, requires_grad=not odd)), ("b", param(2))]
    told(lambda: make_groups([{"params": frozen}]), "2 parameters on rank 0, 1 on rank 1", "'a'")
    told(
        lambda: make_groups([{"params": [("a", param(2 + odd))]}]),
        "'a' float32[2]", "'a' float32[3]",
    )  # fmt: skip
    # One rank's own mistakes.
    here = f"rank {bf.rank()}: dmsgd: parameter 'w'"
    p = param(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told(lambda: make_groups([{"params": [("w", p), ("v", p)]}]), here, "twice")
    for wrong, kind, text in (
        (param(2, dtype=torch.float16), ValueError, "float16[2]"),
        (param(2, dtype=torch.complex64), TypeError, "complex64"),
        (param(2, device="meta"), ValueError, "meta"),
        (torch.nn.Parameter(torch.ones(4, 4)[:, ::2]), ValueError, "not dense"),
        (torch.nn.Parameter(torch.eye(2).to_sparse()), ValueError, "to_dense"),
    ):
        told(lambda w=wrong: make_groups([{"params": [("w", w)]}]), here, text, kind=kind)
    # A dtype that no optimizer takes, and back.
    p, optimizer = make()
    for dtype, fits in ((torch.float64, True), (torch.float16, False), (torch.float32, True)):
        p.data = p.data.to(dtype)
        if fits:
            forth(p, optimizer)
        else:
            told(lambda p=p, o=optimizer: forth(p, o), here, "float16")
    goes_on()
