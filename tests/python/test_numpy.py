"""The operations on NumPy arrays, with real ranks."""

import contextlib
import time

import networkx as nx
import numpy as np
import pytest
from ranks import on_ranks

import bluefog as bf

N = 4


def x_of(rank, shape=(5, 3), dtype=np.float64):
    return np.random.default_rng(rank).standard_normal(shape).astype(dtype)


def mixed(matrix, shape=(5, 3), dtype=np.float64):
    """What rank gets: its column of W times everybody's x."""
    xs = np.stack([x_of(r, shape, dtype) for r in range(N)])
    return np.einsum("i,i...->...", matrix[:, bf.rank()], xs)


def test_before_init():
    for call in (bf.rank, bf.size, bf.local_rank, bf.local_size, bf.barrier):
        with pytest.raises(ValueError, match=r"bf\.init\(\)"):
            call()
    with pytest.raises(ValueError, match=r"bf\.init\(\)"):
        bf.allreduce(np.ones(3))
    assert bf.load_topology() is None
    assert bf.in_neighbor_ranks() == [] == bf.out_neighbor_ranks()
    assert issubclass(bf.BluefogValueError, (bf.BluefogError, ValueError))


@on_ranks(1)
def test_alone():
    assert (bf.rank(), bf.size(), bf.local_rank(), bf.local_size()) == (0, 1, 0, 1)
    assert bf.launched_by() == "alone"
    x = x_of(0)
    for y in (bf.neighbor_allreduce(x), bf.allreduce(x), bf.broadcast(x, 0), bf.allgather(x)):
        np.testing.assert_array_equal(x, y)
        assert not np.shares_memory(x, y)
    assert bf.in_neighbor_ranks() == []
    bf.barrier()
    assert bf.consensus_distance([x]) == 0.0


@on_ranks(N)
def test_place_and_default_topology():
    assert bf.size() == N == bf.local_size()
    assert bf.rank() == bf.local_rank()
    r = bf.rank()
    assert bf.in_neighbor_ranks() == sorted({(r - 1) % N, (r - 2) % N})
    assert bf.out_neighbor_ranks() == sorted({(r + 1) % N, (r + 2) % N})
    graph = bf.load_topology()
    assert isinstance(graph, nx.DiGraph)
    assert graph[0][1]["weight"] == pytest.approx(1 / 3)


@on_ranks(N)
def test_neighbor_allreduce_shapes_and_types():
    matrix = bf.topology.exponential(N).to_matrix()
    for dtype, tolerance in ((np.float64, 1e-15), (np.float32, 1e-6)):
        for shape in ((), (1,), (0,), (3, 0, 2), (5, 3), (70_001,), (1,) * 10 + (3,)):
            x = x_of(bf.rank(), shape, dtype)
            before = x.copy()
            y = bf.neighbor_allreduce(x)
            assert y.shape == shape and y.dtype == dtype and y.flags.writeable
            np.testing.assert_allclose(y, mixed(matrix, shape, dtype), atol=tolerance)
            np.testing.assert_array_equal(x, before)
    # A tensor with gaps, read-only memory, and a scalar.
    big = x_of(bf.rank(), (5, 6))
    big.flags.writeable = False
    xs = np.stack([x_of(r, (5, 6))[:, ::2] for r in range(N)])
    want = np.einsum("i,i...->...", matrix[:, bf.rank()], xs)
    np.testing.assert_allclose(bf.neighbor_allreduce(big[:, ::2]), want, atol=1e-15)
    assert bf.allreduce(np.float64(bf.rank())).shape == ()


@on_ranks(N)
def test_uniform_weights_are_a_sum_and_one_division():
    tiny = np.array([2.0**-256])
    bf.set_topology(bf.topology.ring(N))
    assert bf.neighbor_allreduce(tiny)[0] == 2.0**-256
    y = bf.neighbor_allreduce(
        tiny, self_weight=1 / 3, src_weights=dict.fromkeys(bf.in_neighbor_ranks(), 1 / 3)
    )
    assert y[0] == 2.0**-256


@on_ranks(N)
def test_explicit_weights():
    r, x = bf.rank(), x_of(bf.rank())
    # Static: the topology is sent to, one source is left out.
    source = bf.in_neighbor_ranks()[0]
    y = bf.neighbor_allreduce(x, self_weight=np.float64(0.5), src_weights={source: 2})
    np.testing.assert_allclose(y, 0.5 * x + 2 * x_of(source), atol=1e-14)
    # Dynamic: a ring to the right, weights on both ends; then as lists.
    left, right = (r - 1) % N, (r + 1) % N
    y = bf.neighbor_allreduce(
        x, self_weight=1, src_weights={left: 0.5}, dst_weights={right: float(r + 1)}
    )
    np.testing.assert_allclose(y, x + 0.5 * (left + 1) * x_of(left), atol=1e-14)
    y = bf.neighbor_allreduce(x, self_weight=0.0, src_weights={left: 1.0}, dst_weights=[right])
    np.testing.assert_array_equal(y, x_of(left))
    # Nobody to send to and nobody to receive from.
    y = bf.neighbor_allreduce(x, self_weight=3.0, src_weights={}, dst_weights=[])
    np.testing.assert_array_equal(y, 3 * x)


@on_ranks(N)
def test_wrong_weights():
    r, x = bf.rank(), np.ones(3)
    bf.set_topology(bf.topology.ring(N, "right"))
    left = (r - 1) % N
    other = (r + 1) % N
    wrong = (
        ({"self_weight": 1.0}, "src_weights"),
        ({"src_weights": {left: 1.0}}, "self_weight"),
        ({"dst_weights": [other]}, "self_weight"),
        ({"self_weight": 1.0, "src_weights": {other: 1.0}}, f"rank {other}"),
        ({"self_weight": 1.0, "src_weights": {N: 1.0}, "dst_weights": []}, f"rank {N}"),
        ({"self_weight": 1.0, "src_weights": {r: 1.0}, "dst_weights": []}, "itself"),
        ({"self_weight": 1.0, "src_weights": {}, "dst_weights": [left, left]}, "twice"),
    )
    for arguments, text in wrong:
        with pytest.raises(ValueError, match=text):
            bf.neighbor_allreduce(x, **arguments)
    for old in ("neighbor_weights", "send_neighbors"):
        with pytest.raises(TypeError):
            bf.neighbor_allreduce(x, **{old: {}})
    with pytest.raises(ValueError, match="float"):
        bf.neighbor_allreduce(np.arange(3))
    with pytest.raises(TypeError, match="list"):
        bf.neighbor_allreduce([1.0, 2.0])
    with pytest.raises(TypeError, match="complex128"):
        bf.neighbor_allreduce(np.ones(2, complex))
    np.testing.assert_array_equal(bf.neighbor_allreduce(x), x)


@on_ranks(N)
def test_global_operations():
    r = bf.rank()
    for dtype in (np.float64, np.float32, np.int32, np.int64):
        x = (10 * x_of(r)).astype(dtype)
        total = np.sum([(10 * x_of(s)).astype(dtype) for s in range(N)], axis=0)
        y = bf.allreduce(x, average=False)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, total, rtol=1e-5 if dtype == np.float32 else 1e-14)
    with pytest.raises(AssertionError, match="average"):
        bf.allreduce(np.arange(3))
    # The same bits everywhere, also where the parts do not divide evenly.
    mean = bf.allreduce(x_of(r, (1001,), np.float32))
    everybody = bf.allgather(mean)
    assert everybody.shape == (N * 1001,)
    assert all(np.array_equal(mean, part) for part in everybody.reshape(N, -1))
    for dtype in ("u1", "i1", "i2", "i4", "i8", "f4", "f8", "?"):
        x = np.arange(r, r + 6).reshape(2, 3).astype(dtype)
        np.testing.assert_array_equal(
            bf.broadcast(x, N - 1), np.arange(N - 1, N + 5).reshape(2, 3).astype(dtype)
        )
        gathered = bf.allgather(x)
        assert gathered.shape == (2 * N, 3)
        np.testing.assert_array_equal(
            gathered[-2:], np.arange(N - 1, N + 5).reshape(2, 3).astype(dtype)
        )
    assert bf.allgather(np.float64(r)).tolist() == list(range(N))
    np.testing.assert_array_equal(
        bf.allgather(np.asfortranarray(np.full((2, 3), r))),
        np.repeat(np.arange(N), 2)[:, None] + np.zeros((1, 3), int),
    )
    with pytest.raises(ValueError, match=f"root rank {N}"):
        bf.broadcast(np.ones(2), N)
    # In place.
    x = x_of(r)
    assert bf.broadcast_(x, 2) is x
    np.testing.assert_array_equal(x, x_of(2))
    x[:] = r
    handle = bf.allreduce_nonblocking_(x)
    assert isinstance(handle, int)
    assert bf.synchronize(handle) is x
    assert (x == 1.5).all()


@on_ranks(N)
def test_in_place_needs_writable_dense_memory():
    x = np.ones((4, 4))
    for wrong, text in ((x[:, ::2], "dense"), (np.broadcast_to(x, (2, 4, 4)), "read-only")):
        with pytest.raises(ValueError, match=text) as error:
            bf.allreduce_(wrong, name="weights")
        assert "'weights' of allreduce_" in str(error.value)
    with pytest.raises(TypeError, match="NumPy arrays only"):
        bf.broadcast_(np.float64(1), 0)
    assert (bf.allreduce_(x) == 1).all()


@on_ranks(N)
def test_handles():
    r = bf.rank()
    # Fifty at once, named, in another order on every rank.
    order = np.random.default_rng(r).permutation(50)
    handles = {i: bf.allreduce_nonblocking(np.full(100 + i, float(i)), name=f"t{i}") for i in order}
    for i, handle in handles.items():
        y = bf.synchronize(handle)
        assert (y == i).all() and y.shape == (100 + i,)
    handle = bf.neighbor_allreduce_nonblocking(np.ones(3))
    bf.barrier()
    y = bf.wait(handle)
    assert (y == 1).all()
    for call in (bf.synchronize, bf.wait, bf.poll):
        with pytest.raises(ValueError, match=f"handle {handle} "):
            call(handle)
    handle = bf.broadcast_nonblocking(np.ones(3), 0)
    while not bf.poll(handle):
        pass
    bf.synchronize(handle)


@on_ranks(N)
def test_same_name_again_and_in_flight():
    left = (bf.rank() - 1) % N
    right = (bf.rank() + 1) % N
    ring = {"self_weight": 0.0, "src_weights": {left: 1.0}, "dst_weights": [right]}
    for _ in range(3):
        np.testing.assert_array_equal(
            bf.neighbor_allreduce(x_of(bf.rank()), name="again", **ring), x_of(left)
        )
    with pytest.raises(ValueError, match=r"again.*another name"):
        bf.neighbor_allreduce(np.ones(7), name="again", **ring)
    if bf.rank() == 0:
        handle = bf.allreduce_nonblocking(np.ones(100_000), name="twice")
        with pytest.raises(ValueError, match=r"'twice'.*in flight"):
            bf.allreduce(np.ones(100_000), name="twice")
        bf.barrier()
        bf.synchronize(handle)
    else:
        bf.barrier()
        bf.allreduce(np.ones(100_000), name="twice")


@on_ranks(N)
def test_mismatch_is_an_error_on_both_ends():
    """Another shape on rank 1: everybody who waits for the result is told; then all goes on."""
    r = bf.rank()
    for graph in ("fully-connected", "ring"):
        for late in range(N):  # Whoever comes last.
            bf.set_topology(graph)
            bf.barrier()
            if r == late:
                time.sleep(0.1)
            name = f"mismatch {graph} {late}"
            try:
                result = bf.neighbor_allreduce(np.ones(7 if r == 1 else 5), name=name)
            except ValueError as error:
                text = str(error)
                assert f"'{name}'" in text and "rank 1" in text
                assert "float64[7]" in text and "float64[5]" in text
            else:
                # Only of who needs nothing from rank 1, and had all it needs before it was told.
                assert graph == "ring" and r == 3 and (result == np.ones(5)).all()
    bf.barrier()
    assert (bf.neighbor_allreduce(np.ones(4), name="fits") == 1).all()


@on_ranks(N)
def test_unexpected_sender_is_an_error_on_both_ends():
    """Rank 0 sends to 1, which listens to 2 only: 0 and 1 are told, and later calls work."""
    # Beyond 8 KiB; a smaller message is on its way before anybody can refuse it.
    r, x = bf.rank(), np.ones(5000)
    ring = {"self_weight": 1.0, "src_weights": {}, "dst_weights": []}
    if r == 0:
        handle = bf.neighbor_allreduce_nonblocking(x, name="d", **{**ring, "dst_weights": [1]})
        bf.neighbor_allreduce(x, name="go", **{**ring, "dst_weights": [2]})
        with pytest.raises(ValueError, match="rank 1"):
            bf.synchronize(handle)
    elif r == 1:
        with pytest.raises(ValueError, match="rank 0"):
            bf.neighbor_allreduce(x, name="d", **{**ring, "src_weights": {2: 1.0}})
    elif r == 2:
        bf.neighbor_allreduce(x, name="go", **{**ring, "src_weights": {0: 1.0}})
        with contextlib.suppress(bf.BluefogError):  # It may be through before rank 1 fails.
            bf.neighbor_allreduce(x, name="d", **{**ring, "dst_weights": [1]})
    bf.barrier()
    y = bf.neighbor_allreduce(x, name="e")
    np.testing.assert_allclose(y, 1)


@on_ranks(N)
def test_set_topology():
    r, x = bf.rank(), x_of(bf.rank())
    matrix = np.array(
        [[0.1, 0.9, 0, 0], [0.3, 0.1, 0.5, 0], [0.6, 0, 0.5, 0.2], [0, 0, 0, 0.8]]
    )  # Not circulant: rows and columns cannot be mixed up.
    assert bf.set_topology(matrix)
    np.testing.assert_allclose(bf.neighbor_allreduce(x), mixed(matrix), atol=1e-14)
    assert bf.in_neighbor_ranks() == [i for i in range(N) if i != r and matrix[i, r] > 0]
    assert bf.out_neighbor_ranks() == [i for i in range(N) if i != r and matrix[r, i] > 0]
    # A networkx graph: its own weights if is_weighted, else uniform.
    graph = nx.from_numpy_array(matrix, create_using=nx.DiGraph)
    bf.set_topology(graph, is_weighted=True)
    assert bf.load_topology() is graph
    np.testing.assert_allclose(bf.neighbor_allreduce(x), mixed(matrix), atol=1e-14)
    bf.set_topology(graph)
    uniform = (matrix > 0) / (matrix > 0).sum(axis=0)
    np.testing.assert_allclose(bf.neighbor_allreduce(x), mixed(uniform), atol=1e-14)
    bf.set_topology(nx.path_graph(N))
    path = bf.topology.uniform([[1], [0, 2], [1, 3], [2]]).to_matrix()
    np.testing.assert_allclose(bf.neighbor_allreduce(x), mixed(path), atol=1e-14)
    # A sequence: the round is the number of calls since, also when it was the same one before.
    sequence = bf.topology.one_peer_exponential(N)
    for calls in (5, 1):
        bf.set_topology(sequence)
        for t in range(calls):
            y = bf.neighbor_allreduce(x)
            np.testing.assert_allclose(y, mixed(sequence.to_matrix(t)), atol=1e-14)
            # Of some ranks only, along no topology: nobody's round goes on.
            if r < 2:
                pair = {1 - r: 0.5}
                bf.neighbor_allreduce(
                    x, self_weight=0.5, src_weights=pair, dst_weights=[1 - r], name="pair"
                )
    # Each name has its own, so the order of submission is free.
    for t in range(1, 3):
        names = ["a", "b"] if r % 2 == 0 else ["b", "a"]
        handles = [bf.neighbor_allreduce_nonblocking(x, name=name) for name in names]
        for handle in handles:
            y = bf.synchronize(handle)
            np.testing.assert_allclose(y, mixed(sequence.to_matrix(t - 1)), atol=1e-14)
    assert bf.out_neighbor_ranks() == sorted({(r + 1) % N, (r + 2) % N})
    assert bf.load_topology().number_of_edges() == 3 * N
    # None and init() bring the default back.
    assert bf.set_topology(None)
    assert bf.load_topology().number_of_edges() == 3 * N
    bf.init(lambda n: bf.topology.star(n))
    assert bf.in_neighbor_ranks() == ([1, 2, 3] if r == 0 else [0])
    bf.init()
    assert len(bf.in_neighbor_ranks()) == 2


@on_ranks(N)
def test_another_size_under_a_name_on_one_rank_is_told_to_its_partners():
    bf.set_topology(bf.topology.ring(N))
    r = bf.rank()
    for call in (bf.allreduce, bf.neighbor_allreduce):
        name = f"grown {call.__name__}"
        call(np.ones(4), name=name)
        if call is bf.allreduce or r != 3:
            with pytest.raises(ValueError, match=r"rank 1: .*float64\[4\].*float64\[5\]"):
                call(np.ones(5 if r == 1 else 4), name=name)
        else:  # No neighbour of rank 1: its right result may come before its neighbours fail.
            with contextlib.suppress(ValueError):
                call(np.ones(4), name=name)
        bf.barrier()
        # It counted as a use.
        np.testing.assert_allclose(call(np.full(4, 2.0), name=name), 2.0)


@on_ranks(N)
def test_weights_that_are_no_numbers():
    other = (bf.rank() + 1) % N
    for weights in ({"self_weight": np.nan}, {"src_weights": {other: np.inf}}):
        arguments = {"self_weight": 0.5, "src_weights": {other: 0.5}, "dst_weights": [other]}
        with pytest.raises(ValueError, match="weights must be finite"):
            bf.neighbor_allreduce(np.ones(3), **{**arguments, **weights})


@on_ranks(N)
def test_wrong_topologies():
    negative = np.eye(N)
    negative[1, 2] = -0.5
    outside = nx.DiGraph([(0, 1), (1, 2), (2, 7), (7, 0)])
    for graph, kind, text in (
        (negative, ValueError, r"-0\.5"),
        (np.eye(3), ValueError, "3.*4"),
        (np.ones((2, 3)), ValueError, r"\(2, 3\)"),
        (np.full((N, N), np.nan), ValueError, "nan"),
        (outside, ValueError, "7"),
        (nx.complete_graph(3, nx.DiGraph), TypeError, "3 nodes.*4 ranks"),
        (bf.topology.ring(5), ValueError, "5.*4"),
        ("nosuch", ValueError, "set_topology.*nosuch.*ring"),
        ([[1.0]], TypeError, "list"),
    ):
        with pytest.raises(kind, match=text):
            bf.set_topology(graph)
    assert len(bf.in_neighbor_ranks()) == 2
    bf.set_topology("fully-connected")  # A generator of bluefog.topology by its name.
    assert len(bf.in_neighbor_ranks()) == N - 1


@on_ranks(N)
def test_parameters_and_consensus():
    r = bf.rank()
    params = {"b": np.full(3, float(r)), "a": np.full((2, 2), r + 1.0)}
    bf.broadcast_parameters(params, root_rank=2)
    assert (params["b"] == 2).all() and (params["a"] == 3).all()
    params["b"][:] = r
    # ||x_i - mean||: b differs by r - 1.5 in three elements, a not at all.
    want = np.sqrt(np.mean([3 * (s - 1.5) ** 2 for s in range(N)]))
    assert bf.consensus_distance(params) == pytest.approx(want, rel=1e-14)
    with bf.consensus(params):
        assert (params["b"] == 1.5).all()
    assert (params["b"] == r).all()
    bf.allreduce_parameters(list(params.values()))
    assert (params["b"] == 1.5).all()
    bf.allreduce_parameters([("x", params["a"])])
    assert bf.consensus_distance([]) == 0.0
    for wrong in ("ab", 3, np.ones(3), [("x", np.ones(1)), np.ones(1)]):
        with pytest.raises(ValueError, match="parameters must be"):
            bf.broadcast_parameters(wrong, 0)
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"'w'.*read-only"):
        bf.broadcast_parameters({"w": frozen}, 0)


@on_ranks(N)
def test_empty_and_foreign_tensors():
    x = bf.empty((2, 3), np.float32)
    assert x.shape == (2, 3) and x.dtype == np.float32 and x.flags.writeable
    x[:] = bf.rank()
    assert (bf.allreduce(x) == 1.5).all()
    assert bf.empty(3).dtype == np.float64
    assert bf.empty((0, 3)).size == 0 and bf.empty(()).shape == ()
    with pytest.raises(ValueError, match="negative"):
        bf.empty((2, -1))
    for shape in ((2**32, 2**32), (2**62,), (0, 2**32, 2**32)):
        with pytest.raises(ValueError, match="too many elements"):
            bf.empty(shape)

    class Foreign:
        def __dlpack__(self, **_):
            return x.__dlpack__()

    y = bf.allreduce(Foreign())
    assert isinstance(y, np.ndarray) and (y == 1.5).all()
    with pytest.raises(TypeError, match="NumPy arrays only"):
        bf.allreduce_(Foreign())
    assert bf.stats()["ops_submitted"] > 0


@on_ranks(N)
def test_shutdown_and_init_again():
    kept = bf.empty(4)
    kept[:] = 7
    for i in range(5):
        bf.shutdown()
        with pytest.raises(ValueError, match=r"bf\.init\(\)"):
            bf.allreduce(np.ones(1))
        bf.init()
        assert bf.allreduce(np.array([float(bf.rank() + i)]))[0] == 1.5 + i
    bf.shutdown()
    bf.shutdown()
    assert (kept == 7).all()


@on_ranks(1)
def test_a_hundred_inits_leak_nothing():
    import os

    def once():
        bf.shutdown()
        bf.init()
        bf.allreduce(np.ones(100_000))

    once()
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(100):
        once()
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before
