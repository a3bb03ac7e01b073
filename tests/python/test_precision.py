"""Messages of fewer bits and delayed mode, with real ranks."""

import io

import numpy as np
import pytest
from ranks import on_ranks, run_script, told

import bluefog

torch = pytest.importorskip("torch")

import bluefog.torch as bf  # noqa: E402

N = 4


def bfloat16(x):
    return torch.from_numpy(x).to(torch.bfloat16).to(torch.float64).numpy()


def float16(x):
    return x.astype(np.float16).astype(np.float64)


@on_ranks(N)
def test_rounded_messages_of_arrays():
    """The mean-preserving form on a star, which no rotation maps onto itself."""
    bluefog.set_topology(bluefog.topology.star(N))
    matrix = bluefog.topology.star(N).to_matrix()
    x = np.random.default_rng(3).standard_normal((N, 1000)).astype(np.float32)
    for message_dtype, rounded in (
        ("bfloat16", bfloat16),
        (torch.bfloat16, bfloat16),
        ("float16", float16),
        (np.float16, float16),
        (np.dtype("float16"), float16),
    ):
        q = rounded(x)
        want = x + matrix.T @ q - q
        before = bluefog.stats()["bytes_sent"]
        y = bluefog.neighbor_allreduce(x[bluefog.rank()], message_dtype=message_dtype)
        edges = 3 if bluefog.rank() == 0 else 1
        assert bluefog.stats()["bytes_sent"] - before == edges * 2 * 1000
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, want[bluefog.rank()], rtol=0, atol=1e-6)
        means = bluefog.allgather(y.reshape(1, -1)).astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(means, x.astype(np.float64).mean(axis=0), rtol=0, atol=2e-7)
    double = x.astype(np.float64)
    y = bluefog.neighbor_allreduce(double[bluefog.rank()], message_dtype=np.float32)
    want = matrix.T @ double  # These have the bits of a float.
    np.testing.assert_allclose(y, want[bluefog.rank()], rtol=0, atol=1e-14)


@on_ranks(N)
def test_rounded_messages_of_tensors():
    bf.set_topology(bf.topology.ring(N))
    x = torch.full((3, 5), 1.001 + bf.rank())
    handle = bf.neighbor_allreduce_nonblocking(x, message_dtype=torch.bfloat16)
    y = bf.synchronize(handle)
    left, right = (bf.rank() - 1) % N, (bf.rank() + 1) % N
    q = [torch.tensor(1.001 + r).to(torch.bfloat16).float() for r in range(N)]
    want = x + (q[left] + q[right] - 2 * q[bf.rank()]) / 3
    torch.testing.assert_close(y, want, rtol=0, atol=1e-6)
    # Ranks that agree keep their values to the bit.
    same = torch.linspace(0.1, 3.3, 101)
    assert torch.equal(bf.neighbor_allreduce(same, message_dtype="bfloat16"), same)
    huge = torch.tensor([1e30, -1e30, 1.0])
    assert torch.equal(bf.neighbor_allreduce(huge, message_dtype="float16"), huge)


@on_ranks(2)
def test_message_dtypes_that_cannot_be():
    x = np.ones(3, np.float32)
    call = bluefog.neighbor_allreduce
    told(lambda: call(x, message_dtype="int8"), "message_dtype is 'int8'", "bfloat16, float16")
    told(lambda: call(x, message_dtype=3), "message_dtype is 3")
    told(lambda: call(x, message_dtype="float64"), "float32 cannot travel as float64")
    half = np.ones(3, np.float16)
    told(lambda: call(half, message_dtype="bfloat16"), "float16 cannot travel as bfloat16")
    told(lambda: call(np.ones(3, np.int32), message_dtype="bfloat16"), "int32")
    np.testing.assert_array_equal(call(x, message_dtype="float32"), x)
    mine = "bfloat16" if bluefog.rank() == 0 else None
    told(
        lambda: call(x, message_dtype=mine, name="differs"),
        "'differs'",
        "bfloat16 on rank 0",
        "float32 on rank 1",
    )
    np.testing.assert_array_equal(call(x, message_dtype="bfloat16", name="differs"), x)


# ---- Optimizers.


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def loss_of(model, step, rank):
    p = next(model.parameters())
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(p.dtype)
    return model(x).square().sum(dim=1).mean()


def train(model, optimizer, steps, schedule=None, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step, bf.rank()).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


LR = [0.1 * 0.8**k for k in range(12)]


def delayed_path(name, steps, matrix_of):
    """The recursion of the documentation in float64: all ranks' models after each step."""
    others = [make_model().double() for _ in range(N)]
    x = torch.stack([vector(m) for m in others])
    m, path = torch.zeros_like(x), []
    for step in range(steps):
        for r, other in enumerate(others):
            torch.nn.utils.vector_to_parameters(x[r], other.parameters())
            other.zero_grad()
            loss_of(other, step, r).backward()
        g = torch.stack([torch.cat([p.grad.flatten() for p in o.parameters()]) for o in others])
        mixed = matrix_of(step).T @ x
        g = g + 0.01 * mixed
        if name == "DSGD":
            x = mixed - LR[step] * g
        elif name == "DmSGD":
            m = 0.9 * m + g
            x = mixed - LR[step] * m
        else:
            m = 0.9 * m + (x - (mixed - LR[step] * g))
            x = x - m
        path.append(x)
    return path


def delayed(name, model, topology, **options):
    optimizer = getattr(bf.optim, name)(
        model.named_parameters(),
        lr=LR[0],
        weight_decay=0.01,
        topology=topology,
        overlap="delayed",
        **options,
    )
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


@on_ranks(N)
def test_delayed_recursions():
    moving = bf.topology.one_peer_exponential(N)
    still = bf.topology.ring(N)
    for name in ("DSGD", "DmSGD", "DecentLaM"):
        topology = still if name == "DecentLaM" else moving

        def matrix_of(step, name=name):
            graph = still if name == "DecentLaM" else moving.at(step)
            return torch.from_numpy(graph.to_matrix())

        model = make_model().double()
        optimizer, schedule = delayed(name, model, topology)
        path = delayed_path(name, 7, matrix_of)
        for step in range(7):
            train(model, optimizer, 1, schedule, start=step)
            torch.testing.assert_close(vector(model), path[step][bf.rank()], rtol=0, atol=1e-13)
        optimizer.synchronize()
        mixed = matrix_of(7).T @ path[6]
        torch.testing.assert_close(vector(model), mixed[bf.rank()], rtol=0, atol=1e-13)
        optimizer.synchronize()  # Nothing is under way any more.
        torch.testing.assert_close(vector(model), mixed[bf.rank()], rtol=0, atol=1e-13)
        train(model, optimizer, 2, schedule, start=7)


@on_ranks(N)
def test_delayed_goes_on_from_a_checkpoint_bit_for_bit():
    for name in ("DmSGD", "DecentLaM"):
        topology = None if name == "DecentLaM" else bf.topology.one_peer_exponential(N)
        bf.set_topology(bf.topology.ring(N))
        model = make_model()
        optimizer, schedule = delayed(name, model, topology, message_dtype="bfloat16")
        train(model, optimizer, 3, schedule)
        file = io.BytesIO()
        torch.save([o.state_dict() for o in (model, optimizer, schedule)], file)
        train(model, optimizer, 4, schedule, start=3)
        file.seek(0)
        again = make_model()
        fresh = delayed(name, again, topology, message_dtype="bfloat16")
        for thing, saved in zip((again, *fresh), torch.load(file)):
            thing.load_state_dict(saved)
        train(again, fresh[0], 4, fresh[1], start=3)
        assert torch.equal(vector(again), vector(model)), name
        # And back in the same objects, which have averages of the later model under way.
        file.seek(0)
        for thing, saved in zip((model, optimizer, schedule), torch.load(file)):
            thing.load_state_dict(saved)
        train(model, optimizer, 4, schedule, start=3)
        assert torch.equal(vector(again), vector(model)), name


@on_ranks(N)
def test_rounded_messages_of_optimizers():
    """Half the bytes, and the ranks' mean after a step as with full messages."""
    bf.set_topology(bf.topology.ring(N))
    size = vector(make_model()).numel()
    for name in ("DSGD", "DmSGD", "DecentLaM"):
        sent, results = [], []
        for message_dtype in (None, "bfloat16", torch.float16):
            model = make_model()
            optimizer = getattr(bf.optim, name)(
                model.named_parameters(), lr=0.05, message_dtype=message_dtype
            )
            train(model, optimizer, 1)  # The first one tells the others its name, too.
            results.append(bf.allreduce(vector(model)))
            torch.testing.assert_close(results[-1], results[0], rtol=0, atol=1e-6)
            before = bf.stats()["bytes_sent"]
            train(model, optimizer, 1, start=1)
            sent.append(bf.stats()["bytes_sent"] - before)
        assert sent == [2 * 4 * size, 2 * 2 * size, 2 * 2 * size]


@on_ranks(2)
def test_what_is_refused():
    def of(name, **options):
        return lambda: getattr(bf.optim, name)(make_model().named_parameters(), lr=0.1, **options)

    told(of("PmSGD", overlap="delayed"), "no delayed mode", "1/38 of it at beta = .9")
    told(of("PmSGD", message_dtype="bfloat16"), "message_dtype=bfloat16", "over all ranks")
    told(of("DSGD", message_dtype="float64"), "parameter '0.weight'", "cannot travel as float64")
    told(of("DSGD", overlap="late"), "overlap is 'late'", "True, False or 'delayed'")
    told(
        of("DSGD", message_dtype=("bfloat16", "float16")[bf.rank()]),
        "message_dtype=bfloat16' on rank 0",
        "message_dtype=float16' on rank 1",
    )
    told(of("DSGD", overlap=("delayed", True)[bf.rank()]), "delayed' on rank 0")
    model = torch.nn.Linear(2, 1)
    optimizer = bf.optim.DSGD(model.named_parameters(), lr=0.1, overlap="delayed")
    model(torch.ones(1, 2)).sum().backward()
    told(optimizer.synchronize, "between backward() and step()", kind=bf.BluefogError)
    optimizer.step()
    optimizer.synchronize()


@on_ranks(2)
def test_delayed_takes_a_graph_from_the_next_step_but_two():
    model = make_model()
    optimizer, _ = delayed("DSGD", model, bf.topology.ring(2))
    train(model, optimizer, 2)
    told(lambda: optimizer.set_topology(bf.topology.ring(2), from_step=2), "too late")
    optimizer.set_topology(bf.topology.fully_connected(2))
    train(model, optimizer, 3, start=2)


@on_ranks(2)
def test_a_checkpoint_on_one_rank_only_is_an_error_on_both():
    model = make_model()
    optimizer, _ = delayed("DSGD", model, bf.topology.ring(2))
    train(model, optimizer, 2)
    if bf.rank() == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    told(lambda: train(model, optimizer, 3), "same step", kind=bf.BluefogError)


def test_delayed_tells_of_a_rank_that_died():
    """What was under way with it fails the next step, and nothing hangs."""
    script = """
import os, torch, bluefog.torch as bf
bf.init()
model = torch.nn.Linear(50, 50)
optimizer = bf.optim.DSGD(model.named_parameters(), lr=0.1, overlap="delayed",
                          topology=bf.topology.ring(2), message_dtype="bfloat16")
try:
    for step in range(50):
        optimizer.zero_grad()
        model(torch.ones(2, 50)).sum().backward()
        optimizer.step()
        if bf.rank() == 1 and step == 3:
            os._exit(7)
except bf.BluefogError as error:
    print(error.code, error)
"""
    zero, one = run_script(2, script)
    assert one.returncode == 7
    assert zero.stdout.startswith("UNAVAILABLE") and "rank 1" in zero.stdout, zero
