"""The operations on PyTorch tensors, with real ranks. What NumPy's tests cover is not repeated."""

import time
import unittest.mock

import pytest
from ranks import on_ranks

torch = pytest.importorskip("torch")

import bluefog.torch as bf  # noqa: E402
from bluefog.torch import _adapter  # noqa: E402

N = 4


@on_ranks(N)
def test_operations():
    r = bf.rank()
    for dtype in (torch.float64, torch.float32):
        y = bf.neighbor_allreduce(torch.full((2, 3), float(r), dtype=dtype))
        want = (r + (r - 1) % N + (r - 2) % N) / 3
        assert y.dtype == dtype and torch.allclose(y, torch.full_like(y, want))
        assert torch.equal(
            bf.allreduce(torch.tensor(float(r), dtype=dtype)), torch.tensor(1.5).to(dtype)
        )
    x = torch.full((3,), r, dtype=torch.int64)
    assert bf.allreduce(x, average=False).tolist() == [6, 6, 6]
    with pytest.raises(AssertionError):
        bf.allreduce(x)
    assert bf.broadcast(torch.tensor([True, False]), 1).tolist() == [True, False]
    half = torch.full((3,), float(r), dtype=torch.bfloat16)
    assert bf.broadcast(half, 3).tolist() == [3.0] * 3 and bf.allgather(half).dtype == half.dtype
    assert bf.allgather(torch.full((2, 2), r)).tolist() == [[i] * 2 for i in range(N) for _ in "ab"]
    assert bf.synchronize(bf.allreduce_nonblocking(torch.zeros(0, 3))).shape == (0, 3)


@on_ranks(N)
def test_autograd_and_memory():
    r = bf.rank()
    leaf = torch.nn.Parameter(torch.full((4, 6), float(r)))
    # Out of place: no history, and strided input is fine.
    y = bf.allreduce(leaf)
    assert not y.requires_grad and (y == 1.5).all()
    assert torch.equal(bf.allreduce(leaf[:, ::2]), torch.full((4, 3), 1.5))
    assert torch.equal(bf.allreduce(leaf.expand(2, 4, 6)), torch.full((2, 4, 6), 1.5))
    # In place: a leaf may be changed, and autograd knows of it.
    (leaf * leaf).sum()
    loss = (leaf * leaf).sum()
    version = leaf._version
    assert bf.broadcast_(leaf, 2) is leaf
    assert (leaf == 2).all() and leaf._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    with pytest.raises(ValueError, match="dense"):
        bf.allreduce_(leaf[:, ::2])
    # channels_last everywhere is an order like any other, and the result keeps it.
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    bf.broadcast_(image, 0)
    y = bf.neighbor_allreduce(image)
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.allclose(y, image)


@on_ranks(N)
def test_what_cannot_be_exchanged():
    for wrong, kind, text in (
        (torch.ones(2, device="meta"), ValueError, "meta"),
        (torch.eye(2).to_sparse(), ValueError, "to_dense"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "dtype"),
        ([1.0], TypeError, "list"),
    ):
        with pytest.raises(kind, match=text) as error:
            bf.allreduce(wrong, average=False, name="w")
        assert "'w'" in str(error.value)
    order = torch.channels_last if bf.rank() == 0 else torch.contiguous_format
    with pytest.raises(ValueError, match="memory order"):
        bf.neighbor_allreduce(torch.ones(2, 3, 4, 5).to(memory_format=order), name="format")
    bf.barrier()


@on_ranks(N)
def test_models():
    r = bf.rank()
    torch.manual_seed(r)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    assert bf.consensus_distance(model) > 0
    bf.broadcast_parameters(model.state_dict(), root_rank=1)
    assert bf.consensus_distance(model) == 0
    with torch.no_grad():
        model[0].bias.fill_(r)
        model[1].running_mean.fill_(r)
    # Three elements apart by r - 1.5; buffers are not parameters.
    assert bf.consensus_distance(model) == pytest.approx((3 * 1.25) ** 0.5)
    with pytest.raises(KeyError), bf.consensus(model):
        assert (model[0].bias == 1.5).all() and (model[1].running_mean == 1.5).all()
        raise KeyError  # The model comes back all the same.
    assert (model[0].bias == r).all() and (model[1].running_mean == r).all()
    bf.allreduce_parameters(list(model.named_parameters()))
    assert bf.consensus_distance(model) == 0


@on_ranks(2)
def test_memory_outlives_its_tensor():
    """A tensor that gets other memory during an operation: the engine still has the first."""
    r = bf.rank()
    x = torch.full((1 << 18,), float(r + 1))
    if r == 1:
        time.sleep(0.2)  # So that rank 0's memory is read later.
    handle = bf.allreduce_nonblocking(x)
    x.data = torch.empty(0)
    reused = [torch.full((1 << 18,), 7.0) for _ in range(4)]
    assert (bf.synchronize(handle) == 1.5).all() and len(reused) == 4


@on_ranks(2)
def test_older_pytorch():
    """Without DLPack's C exchange API tensors travel in capsules."""
    new = bf.allreduce(torch.full((2, 3), float(bf.rank())))
    with unittest.mock.patch.object(_adapter, "_EXCHANGE", False):
        old = bf.allreduce(torch.full((2, 3), float(bf.rank())))
        x = torch.full((3,), float(bf.rank()))
        assert bf.broadcast_(x, 1) is x and (x == 1).all()
    assert torch.equal(new, old) and (old == 0.5).all()


@on_ranks(1)
def test_in_place_on_a_negative_view_is_refused():
    z = torch.complex(torch.ones(3), torch.ones(3))
    y = torch.imag(z.conj())
    assert y.is_neg() and torch.equal(bf.allreduce(y), -torch.ones(3))
    for call in (bf.allreduce_, lambda t: bf.broadcast_(t, 0)):
        with pytest.raises(ValueError, match="negative bit"):
            call(y)


@on_ranks(N)
def test_empty():
    x = bf.empty((3, 5))
    assert x.shape == (3, 5) and x.dtype == torch.float32
    x.fill_(bf.rank())
    assert (bf.allreduce(x) == 1.5).all()
    assert bf.empty(2, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="too many elements"):
        bf.empty((2**32, 2**32))
    # A model whose parameters lie in shared memory trains like any other.
    model = torch.nn.Linear(5, 2)
    for name in ("weight", "bias"):
        old = getattr(model, name)
        shared = bf.empty(old.shape)
        shared.copy_(old.detach())
        setattr(model, name, torch.nn.Parameter(shared))
    optimizer = bf.optim.DSGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert torch.isfinite(model.weight).all()
