"""The optimizers on PyTorch models, with real ranks."""

import copy
import io
import json
import subprocess
import time

import pytest
from ranks import on_ranks, run_script

torch = pytest.importorskip("torch")

import bluefog.torch as bf  # noqa: E402

N = 4
ALL = ("DSGD", "PmSGD", "DmSGD", "DecentLaM")


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(
        dtype
    )


def make(name, model, **options):
    bf.set_topology(bf.topology.ring(bf.size()))
    options.setdefault("lr", 0.05)
    options.setdefault("weight_decay", 1e-3)
    return getattr(bf.optim, name)(model.named_parameters(), **options)


def loss_of(model, step, rank=None):
    """Every rank has data of its own."""
    p = next(model.parameters())
    generator = torch.Generator().manual_seed(1000 * step + (bf.rank() if rank is None else rank))
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(p.dtype)
    return model(x).square().sum(dim=1).mean()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@on_ranks(1)
def test_alone_equals_torch_sgd_bit_for_bit():
    for name in ("DSGD", "PmSGD", "DmSGD"):
        for weight_decay in (0.0, 1e-2):
            model, reference = make_model(), make_model()
            ours = make(name, model, lr=0.1, weight_decay=weight_decay)
            theirs = torch.optim.SGD(
                reference.parameters(),
                lr=0.1,
                momentum=0.0 if name == "DSGD" else 0.9,
                weight_decay=weight_decay,
            )
            train(model, ours, 6)
            train(reference, theirs, 6)
            assert same(model, reference), name


@on_ranks(N)
def test_recursions():
    """Each optimizer against its formula, all ranks simulated here in float64."""
    matrix = torch.from_numpy(bf.topology.ring(N).to_matrix())
    for name in ALL:
        model = make_model(torch.float64)
        optimizer = make(name, model, lr=0.1, weight_decay=0.01)
        train(model, optimizer, 4)
        others = [make_model(torch.float64) for _ in range(N)]
        x = torch.stack([vector(m) for m in others])
        m = torch.zeros_like(x)
        lr, beta = 0.1, 0.9
        for step in range(4):
            for r, other in enumerate(others):
                torch.nn.utils.vector_to_parameters(x[r], other.parameters())
                other.zero_grad()
                loss_of(other, step, r).backward()
            g = torch.stack([torch.cat([p.grad.flatten() for p in o.parameters()]) for o in others])
            g = g + 0.01 * x
            if name == "DSGD":
                x = matrix.T @ (x - lr * g)
            elif name == "PmSGD":
                m = beta * m + g.mean(dim=0, keepdim=True)
                x = x - lr * m
            elif name == "DmSGD":
                m = beta * m + g
                x = matrix.T @ (x - lr * m)
            else:
                m = beta * m + (x - matrix.T @ (x - lr * g))
                x = x - m
        torch.testing.assert_close(vector(model), x[bf.rank()], rtol=0, atol=1e-13)


@on_ranks(N)
def test_overlap_on_and_off_agree_bit_for_bit():
    for name in ALL:
        results = []
        for overlap in (True, False, True):
            model = make_model()
            train(model, make(name, model, overlap=overlap), 5)
            results.append(model)
        assert same(results[0], results[1]) and same(results[0], results[2]), name
        distance = bf.consensus_distance(results[0])
        assert (distance == 0) == (name == "PmSGD")


@on_ranks(N)
def test_initial_broadcast():
    model = make_model(seed=bf.rank())
    make("DSGD", model)
    assert same(model, make_model(seed=0))
    model = make_model(seed=bf.rank())
    make("DSGD", model, broadcast=False)
    assert same(model, make_model(seed=bf.rank()))


@on_ranks(N)
def test_resume_bit_for_bit():
    for name in ALL:
        topology = None if name == "DecentLaM" else bf.topology.one_peer_exponential(N)
        model = make_model()
        optimizer = make(name, model, topology=topology)
        train(model, optimizer, 3)
        # Through a file, as checkpoints go; an odd number of steps, so that the round matters.
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        checkpoint = torch.load(file)
        train(model, optimizer, 3, start=3)
        again = make_model(seed=7)
        resumed = make(name, again, lr=0.9, topology=topology)
        again.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["optimizer"])
        assert resumed.param_groups[0]["step"] == 3 and resumed.param_groups[0]["lr"] == 0.05
        train(again, resumed, 3, start=3)
        assert same(model, again), name
        assert resumed.param_groups[0]["step"] == 6


@on_ranks(N)
def test_loaders_find_state_and_do_not_communicate():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for name in ALL:
        model = make_model()
        optimizer = make(name, model)
        if bf.rank() == 0:  # On one rank only: any communication would hang.
            get_optimizer_state_dict(model, optimizer)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups[0]["step"] == 0
        train(model, optimizer, 1)


@on_ranks(N)
def test_schedulers_groups_and_closures():
    model = make_model()
    bf.set_topology(bf.topology.ring(N))
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.2},
        {"params": list(model[2].parameters()), "momentum": 0.5},
    ]
    optimizer = bf.optim.DmSGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    reference = make_model()
    plain = bf.optim.DmSGD(
        [
            {"params": list(reference[0].parameters()), "lr": 0.2},
            {"params": list(reference[2].parameters()), "momentum": 0.5},
        ],
        lr=0.1,
        overlap=False,
    )
    for step in range(4):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        scheduler.step()
        plain.zero_grad()
        loss_of(reference, step).backward()
        plain.step()
        for group, lr in zip(plain.param_groups, (0.2, 0.1)):
            group["lr"] = lr * 0.1 ** ((step + 1) // 2)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), reference.parameters())
    )
    assert scheduler.get_last_lr() == pytest.approx([0.002, 0.001])


@on_ranks(N)
def test_accumulation_under_no_sync():
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make("DecentLaM", model, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            before = bf.stats()["ops_submitted"]
            with optimizer.no_sync():
                loss_of(model, 10 * step).backward()
            assert bf.stats()["ops_submitted"] == before
            loss_of(model, 10 * step + 1).backward()
            optimizer.step()
        # Only inside no_sync, then step: everything goes at step().
        optimizer.zero_grad()
        with optimizer.no_sync():
            loss_of(model, 77).backward()
        optimizer.step()
        results.append(model)
    assert same(*results)


@on_ranks(N)
def test_frozen_unused_and_thawed():
    for overlap in (True, False):
        model = make_model()
        model.extra = torch.nn.Linear(2, 2)  # Never used.
        for p in model[0].parameters():
            p.requires_grad_(False)
        optimizer = make("DmSGD", model, weight_decay=0.0, overlap=overlap)
        frozen, unused = vector(model[0]), vector(model.extra)
        with torch.no_grad():
            model.extra.weight.fill_(bf.rank())  # It still averages, with a zero gradient.
        train(model[:3], optimizer, 1)
        assert torch.equal(vector(model[0]), frozen)
        r = bf.rank()
        assert torch.allclose(model.extra.weight, torch.tensor((r + (r - 1) % N + (r + 1) % N) / 3))
        assert torch.equal(model.extra.bias, unused[-2:])
        # Thawed between steps: it takes part at once.
        for p in model[0].parameters():
            p.requires_grad_(True)
        train(model[:3], optimizer, 2, start=1)
        assert not torch.equal(vector(model[0]), frozen)
        assert bf.consensus_distance(model[0]) < 1


@on_ranks(N)
def test_group_added_later_and_dtype_changed_between_steps():
    for overlap in (True, False):
        model = make_model()
        optimizer = make("DmSGD", model, overlap=overlap)
        train(model, optimizer, 2)
        extra = torch.nn.Linear(3, 3)
        bf.broadcast_parameters(extra.state_dict(), 0)
        optimizer.add_param_group({"params": list(extra.named_parameters()), "lr": 0.01})
        before = vector(extra)
        both = torch.nn.Sequential(model, extra)
        train(both, optimizer, 2, start=2)
        assert not torch.equal(vector(extra), before)
        assert [g["step"] for g in optimizer.param_groups] == [4, 4]
        both.to(torch.float64)
        train(both, optimizer, 2, start=4)
        state = optimizer.state[extra.weight]["momentum_buffer"]
        assert extra.weight.dtype == state.dtype == torch.float64
        assert bf.consensus_distance(both) < 1


@on_ranks(N)
def test_channels_last_and_shared_parameters():
    results = []
    for overlap in (True, False):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        tied = torch.nn.Linear(4, 4)
        params = [*conv.parameters(), *tied.parameters()]
        optimizer = bf.optim.DmSGD(params, lr=0.1, overlap=overlap)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step + bf.rank()))
            y = conv(x).mean(dim=(2, 3))
            tied(tied(y)).square().sum().backward()  # Used twice: one gradient.
            if step == 1 and not overlap:
                conv.weight.grad = conv.weight.grad.contiguous()  # Another order than x.
            optimizer.step()
        results.append(torch.nn.Sequential(conv, tied))
    assert same(*results)


@on_ranks(N)
def test_misuse_under_overlap_names_parameter_and_cure():
    """Every misuse raises, and the optimizer works on; here on all ranks at once."""

    def clip(model, optimizer):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    def clear(model, optimizer):
        optimizer.zero_grad()
        optimizer.step()

    def twice(model, optimizer):
        loss_of(model, 1).backward()

    def change_lr(model, optimizer):
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()

    def load(model, optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    model = make_model()
    optimizer = make("DmSGD", model)
    for misuse, texts in (
        (clip, ("'0.weight'", "changed", "overlap=False")),
        (clear, ("'0.weight'", "removed", "overlap=False")),
        (twice, ("'2.", "second", "no_sync")),
        (change_lr, ("lr of group 0", "0.05", "0.025", "overlap=False")),
        (load, ("step()",)),
    ):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        with pytest.raises(bf.BluefogError) as error:
            misuse(model, optimizer)
        for text in texts:
            assert text in str(error.value), error.value
        if misuse is load:
            optimizer.step()
        train(model, optimizer, 1)
    assert bf.consensus_distance(model) < 1
    # All the same is right without overlap.
    model = make_model()
    optimizer = make("DmSGD", model, overlap=False)
    for misuse in (clip, clear, change_lr):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        misuse(model, optimizer)
    twice(model, optimizer)
    optimizer.step()


@on_ranks(N)
def test_misuse_on_one_rank_leaves_the_others_in_step():
    model = make_model()
    optimizer = make("DmSGD", model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step == 1 and bf.rank() == 2:
            model[0].weight.grad.mul_(2)
            with pytest.raises(bf.BluefogError, match="changed"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert bf.allgather(torch.tensor([optimizer.param_groups[0]["step"]])).tolist() == [3] * N


@on_ranks(N)
def test_a_parameter_without_gradient_that_changed_before_step():
    """The step ends with what the engine knew of it; the neighbours do not notice."""
    model = make_model()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(5)))
    optimizer = make("DmSGD", model)
    for change in (lambda p: p.double(), lambda p: torch.zeros(2, 2)):
        train(model, optimizer, 1)
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        before = model.unused.data
        if bf.rank() == 2:
            model.unused.data = change(before)
            with pytest.raises(bf.BluefogError, match=r"'unused' is now .* but was torch.float32"):
                optimizer.step()
            model.unused.data = before
        else:
            optimizer.step()
        train(model, optimizer, 1)
        assert bf.consensus_distance(model) < 1 and (model.unused < 1.1).all()
    assert optimizer.param_groups[0]["step"] == 6


@on_ranks(N)
def test_autograd_sees_the_update():
    model = make_model()
    optimizer = make("DSGD", model)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward(retain_graph=True)  # The parameters are the engine's already.
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    train(model, optimizer, 1)


@on_ranks(N)
def test_values_that_must_work():
    model = make_model()
    optimizer = make("DecentLaM", model, lr=0.0)
    train(model, optimizer, 2)
    assert torch.isfinite(vector(model)).all()
    assert torch.allclose(vector(model), vector(make_model()))
    # NaN travels, and is counted.
    optimizer.zero_grad()
    before = bf.stats()["nonfinite_gradients"]
    (loss_of(model, 0) * float("nan")).backward()
    optimizer.step()
    assert bf.stats()["nonfinite_gradients"] > before
    assert torch.isnan(vector(model)).any()
    # Each element once, infinite ones too.
    x = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = bf.optim.DSGD([x], lr=0.1, topology="ring")
    before = bf.stats()["nonfinite_gradients"]
    x.grad = torch.zeros(100_000)
    x.grad[[0, 7, 99_999]] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    optimizer.step()
    assert bf.stats()["nonfinite_gradients"] - before == 3
    assert x[0] == float("-inf") and x[7] == float("inf") and x[99_999].isnan()
    # Empty and 0-dim parameters, and no gradient at all.
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((0, 3), (), (2,))]
    optimizer = bf.optim.DmSGD(params, lr=0.1)
    optimizer.step()
    (params[1] * 3 + params[2].sum()).backward()
    optimizer.step()
    assert params[1].item() == pytest.approx(-0.3)


@on_ranks(N)
def test_grad_scaler():
    """An overflow is local: that rank sends with g = 0, and nobody waits for it."""
    model = make_model()
    optimizer = make("DSGD", model, overlap=False, weight_decay=0.0)
    reference = make_model()
    plain = make("DSGD", reference, overlap=False, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        overflow = step == 1 and bf.rank() == 0
        optimizer.zero_grad()
        loss = loss_of(model, step) * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        if step == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        if not overflow:
            loss_of(reference, step).backward()
        plain.step()
    assert torch.allclose(vector(model), vector(reference), atol=1e-6)
    assert torch.isfinite(vector(model)).all()
    optimizer = make("DSGD", model, overlap=True)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(bf.BluefogError, match=r"GradScaler.*overlap=False"):
        scaler.step(optimizer)


@on_ranks(N)
def test_what_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"'nosuch'.*decentlam"):
        bf.optim.DistributedOptimizer(model.parameters(), lr=0.1, plugin="nosuch")
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=r"'0\.weight'.*float32"):
            bf.optim.DSGD(make_model(dtype).named_parameters(), lr=0.1)
    strided = torch.nn.Parameter(torch.randn(4, 4)[:, ::2])
    with pytest.raises(ValueError, match=r"'gap'.*not dense"):
        bf.optim.DSGD([("gap", strided)], lr=0.1)
    with pytest.raises(ValueError, match=r"'m'.*meta"):
        bf.optim.DSGD([("m", torch.nn.Parameter(torch.ones(2, device="meta")))], lr=0.1)
    with pytest.raises(ValueError, match=r"momentum is 0\.9.*DmSGD"):
        bf.optim.DSGD(model.parameters(), 0.1, 0.9)
    with pytest.raises(TypeError, match="no hyper-parameter period"):
        bf.optim.DistributedOptimizer(model.parameters(), 0.1, plugin="dsgd", period=3)
    for option in ("lr", "momentum", "weight_decay"):
        with pytest.raises(ValueError, match=f"{option} is -1"):
            bf.optim.DmSGD(model.parameters(), **{"lr": 0.1, option: -1.0})
    # Graphs that DecentLaM does not stand.
    for graph in (bf.topology.exponential(N), bf.topology.one_peer_hypercube(N)):
        with pytest.raises(ValueError, match="decentlam"):
            bf.optim.DecentLaM(model.parameters(), lr=0.1, topology=graph)
    optimizer = bf.optim.DecentLaM(
        model.parameters(), lr=0.1, topology=bf.topology.exponential(N), allow_unstable=True
    )
    train(model, optimizer, 1)
    bf.set_topology(bf.topology.exponential(N))
    with pytest.raises(ValueError, match="decentlam"):
        bf.optim.DecentLaM(model.parameters(), lr=0.1)
    # A sparse gradient.
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = bf.optim.DSGD(embedding.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'weight' is sparse.*sparse=False"):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    bf.barrier()


@on_ranks(N)
def test_parameters_that_differ_between_ranks():
    r = bf.rank()
    names = [("w", torch.nn.Parameter(torch.ones(3 if r == 2 else 4)))]
    with pytest.raises(ValueError) as error:
        bf.optim.DSGD(names, lr=0.1)
    text = str(error.value)
    assert "rank 2" in text and "float32[3]" in text and "float32[4]" in text and "'w'" in text
    with pytest.raises(ValueError, match="rank 1") as error:
        bf.optim.DSGD([("b" if r == 1 else "a", torch.nn.Parameter(torch.ones(2)))], lr=0.1)
    assert "'a'" in str(error.value) and "'b'" in str(error.value)
    kind = bf.optim.DmSGD if r == 3 else bf.optim.DSGD
    with pytest.raises(ValueError, match="rank 3") as error:
        kind([("a", torch.nn.Parameter(torch.ones(2)))], lr=0.1)
    assert f"'{'dmsgd' if r == 3 else 'dsgd'}'" in str(error.value)
    bf.barrier()


@on_ranks(N)
def test_models_of_every_kind():
    """Batch norm, autocast, a compiled model: the optimizer does not care."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    for run in (model, torch.compile(model, backend="eager")):
        optimizer = make("DmSGD", model)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(torch.randn(16, 6)).float().square().mean()
            loss.backward()
            optimizer.step()
    assert torch.isfinite(vector(model)).all()
    assert model[1].num_batches_tracked == 6


@on_ranks(N)
def test_after_a_difference_a_checkpoint_makes_it_work_again():
    for name in ("DecentLaM", "PmSGD"):
        model = make_model()
        optimizer = make(name, model)
        train(model, optimizer, 2)
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = lr * (1 + bf.rank())
        with pytest.raises(ValueError, match="learning rate"):
            train(model, optimizer, 1, start=2)
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match=r"the optimizer failed before.*learning rate"):
            train(model, optimizer, 1, start=2)
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        train(model, optimizer, 2, start=2)
        reference = make_model()
        train(reference, make(name, reference), 4)
        assert same(model, reference), name


def test_a_model_converted_on_one_rank_is_told_on_all():
    script = """
import torch, bluefog.torch as bf
bf.init()
bf.set_topology(bf.topology.ring(3))
model = torch.nn.Linear(4, 2)
optimizer = bf.optim.DecentLaM(model.named_parameters(), lr=0.1)
for step in range(2):
    optimizer.zero_grad()
    try:
        model(next(model.parameters()).new_ones(3, 4)).sum().backward()
        optimizer.step()
    except bf.BluefogError as error:
        print(step, error)
        break
    if bf.rank() == 1:
        model.double()
"""
    results = run_script(3, script)
    assert [r.returncode for r in results] == [0, 0, 0], results
    assert "has left the job" in results[1].stdout  # It waits for the others to do the same.
    for told in (results[0].stdout, results[2].stdout):
        assert told.startswith("1 ") and "rank 1" in told
        assert "was torch.float32[2, 4]" in told and "is torch.float64[2, 4]" in told


@on_ranks(N)
def test_an_optimizer_that_cannot_be_made_on_one_rank_fails_on_all():
    sparse = torch.zeros(4, 4)[:, ::2]
    wrong = {
        "lr is -1.0": lambda model: make("DecentLaM", model, lr=-1.0),
        "dense": lambda _: bf.optim.DSGD([torch.nn.Parameter(sparse)], lr=0.1),
        "no hyper-parameter": lambda model: make(
            "DistributedOptimizer", model, plugin="dsgd", trust=1.0
        ),
        "momentum": lambda model: make("DSGD", model, momentum=0.9),
        "complex64": lambda _: bf.optim.DmSGD([torch.nn.Parameter(torch.zeros(2) * 1j)], lr=0.1),
    }
    for word, make_wrong in wrong.items():
        begin = time.monotonic()
        if bf.rank() == 1:
            with pytest.raises((TypeError, ValueError), match=word):
                make_wrong(make_model())
        else:
            with pytest.raises(ValueError, match=f"an optimizer cannot be made: rank 1: .*{word}"):
                make("DecentLaM", make_model())
        assert time.monotonic() - begin < 10
        # The next ones meet.
        model = make_model()
        train(model, make("DecentLaM", model), 2)


@on_ranks(N)
def test_a_model_that_cannot_be_exchanged_any_more_on_one_rank():
    model = make_model()
    optimizer = make("DecentLaM", model, overlap=False)
    train(model, optimizer, 1)
    if bf.rank() == 1:
        model.half()
    if bf.rank() in (0, 2):
        with pytest.raises(bf.BluefogError, match=r"rank 1.*is torch.float16"):
            train(model, optimizer, 1, start=1)
    elif bf.rank() == 1:
        with pytest.raises(ValueError, match="must be float32 or float64"):
            train(model, optimizer, 1, start=1)
    bf.barrier()
    # New ones meet.
    model = make_model()
    train(model, make("DecentLaM", model), 2)


@on_ranks(3)
def test_models_converted_to_what_one_rank_cannot_exchange_recover_from_a_checkpoint():
    model = make_model()
    optimizer = make("DecentLaM", model, overlap=False)
    train(model, optimizer, 2)
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        model.half() if bf.rank() == 1 else model.double()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"rank 1.*must be float32 or float64"):
                train(model, optimizer, 1, start=2)
        model.float()
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    train(model, optimizer, 2, start=2)
    reference = make_model()
    train(reference, make("DecentLaM", reference), 4)
    assert same(model, reference)


@on_ranks(N)
def test_an_optimizer_that_cannot_be_made_anywhere_leaves_the_next_in_order():
    for _ in range(3):
        with pytest.raises(ValueError, match=r"lr is -1\.0"):
            make("DecentLaM", make_model(), lr=-1.0)
        model = make_model()
        train(model, make("DecentLaM", model), 2)


@on_ranks(N)
def test_settings_that_differ_between_ranks():
    with pytest.raises(ValueError, match=r"broadcast=False.*on rank 0.*broadcast=True.*on rank 1"):
        make("DSGD", make_model(), broadcast=bf.rank() != 0)


@on_ranks(N)
def test_bytes_pinned_are_those_that_info_tells():
    elements = 1 << 18

    def told(model_bytes):
        command = ["bluefog", "info", "--json", "--model-bytes", str(model_bytes)]
        info = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return {row["name"]: row["pinned_bytes"] for row in info["optimizers"]}

    slots, pinned = told(1), told(4 * elements)
    for name in ALL:
        weight = torch.nn.Parameter(torch.zeros(elements))
        optimizer = getattr(bf.optim, name)([weight], lr=0.1, topology=bf.topology.ring(N))
        weight.sum().backward()
        optimizer.step()
        difference = pinned[name.lower()] - slots[name.lower()]
        assert optimizer.bytes_pinned == pytest.approx(difference, abs=10), name


@on_ranks(N)
def test_topologies_of_optimizers():
    x = torch.nn.Parameter(torch.full((3,), float(bf.rank())))
    sequence = bf.topology.one_peer_hypercube(N)
    optimizer = bf.optim.DSGD([x], lr=0.1, topology=sequence, broadcast=False)
    optimizer.step()
    assert (x == (bf.rank() // 2 * 2 + 0.5)).all()  # With rank XOR 1.
    optimizer.step()
    assert (x == 1.5).all()  # With rank XOR 2: the exact average.
    with torch.no_grad():
        x.fill_(bf.rank())
    # From step 3 on, another graph, on all ranks alike.
    optimizer.set_topology(bf.topology.fully_connected(N))
    optimizer.step()
    assert not (x == 1.5).all()
    optimizer.step()
    assert torch.allclose(x, torch.tensor(1.5))
    # It comes at that step also if the parameters are registered anew before it.
    optimizer = bf.optim.DSGD([x], lr=0.1, topology=bf.topology.ring(N), broadcast=False)
    optimizer.set_topology("fully-connected", from_step=2)
    for step, mixed in enumerate((False, False, True)):
        x.data = torch.full((3,), float(bf.rank()), dtype=(torch.float32, torch.float64)[step % 2])
        optimizer.step()
        assert torch.allclose(x, torch.tensor(1.5, dtype=x.dtype)) == mixed
    # Without topology=, that of set_topology at each step.
    optimizer = bf.optim.DSGD([x], lr=0.1, broadcast=False)
    bf.set_topology(bf.topology.star(N))
    with torch.no_grad():
        x.fill_(float(bf.rank() == 0))
    optimizer.step()
    assert torch.allclose(x, torch.tensor(0.25))


@on_ranks(N)
def test_models_and_optimizers_go_as_others_do():
    """Pickled, copied and dropped in the middle of a step."""
    import gc
    import weakref

    model = make_model()
    optimizer = make("DmSGD", model)
    train(model, optimizer, 1)
    torch.save(model, io.BytesIO())
    clone = copy.deepcopy(model)
    loss_of(clone, 0).backward()  # No hook came along.
    assert not optimizer._stepping
    # A copy of both is another optimizer.
    both = copy.deepcopy((model, optimizer))
    train(*both, 1, start=1)
    train(model, optimizer, 1, start=1)
    assert same(both[0], model)
    reference = weakref.ref(optimizer)
    del optimizer, both
    gc.collect()
    assert reference() is None
    # Its hooks are without effect, and another optimizer may take over.
    train(model, make("DSGD", model), 2)
    # Dropped between backward and step, on all ranks: nothing is read that is gone.
    optimizer = make("DmSGD", model)
    loss_of(model, 0).backward()
    del optimizer
    gc.collect()
    model = make_model()
    train(model, make("DSGD", model), 2)


@on_ranks(N)
def test_optimizer_lives_through_shutdown_and_init():
    model = make_model()
    optimizer = make("DmSGD", model)
    train(model, optimizer, 1)
    bf.shutdown()
    with pytest.raises(ValueError, match=r"bf\.init\(\)"):
        loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"bf\.init\(\)"):
        optimizer.step()
    bf.init()
    train(model, optimizer, 2, start=1)
    assert optimizer.param_groups[0]["step"] == 3
