"""Operations over machines: one host that looks like several, with real ranks."""

import networkx as nx
import numpy as np
import pytest
from ranks import on_ranks, run_script, told

import bluefog as bf

TWO_BY_TWO = {"BLUEFOG_NODES_PER_MACHINE": "2"}


def x_of(rank, shape=(5, 3), dtype=np.float64):
    return np.random.default_rng(rank).standard_normal(shape).astype(dtype)


def means(shape=(5, 3), dtype=np.float64):
    """Of each machine."""
    xs = np.stack([x_of(r, shape, np.float64) for r in range(bf.size())])
    return xs.reshape(bf.machine_size(), bf.local_size(), *shape).mean(axis=1)


def check_average(matrix, **tolerance):
    for shape in ((), (1,), (0,), (5, 3), (70_001,)):
        for dtype, atol in ((np.float64, 1e-14), (np.float32, 1e-6)):
            x = x_of(bf.rank(), shape, dtype)
            before = x.copy()
            y = bf.hierarchical_neighbor_allreduce(x)
            np.testing.assert_array_equal(x, before)
            assert y.dtype == dtype and y.shape == shape
            expected = np.einsum("i,i...->...", matrix[:, bf.machine_rank()], means(shape))
            np.testing.assert_allclose(y, expected, atol=atol, rtol=0)
            # The same bits on all ranks of a machine.
            every = bf.allgather(np.atleast_1d(y).ravel()).reshape(bf.size(), -1)
            first = every[bf.machine_rank() * bf.local_size()]
            np.testing.assert_array_equal(np.atleast_1d(y).ravel(), first)


def test_before_init():
    for call in (bf.machine_size, bf.machine_rank, bf.is_homogeneous):
        with pytest.raises(ValueError, match=r"bf\.init\(\)"):
            call()
    assert bf.load_machine_topology() is None
    assert bf.in_neighbor_machine_ranks() == [] == bf.out_neighbor_machine_ranks()
    assert not bf.is_machine_topo_weighted()


@on_ranks(4, **TWO_BY_TWO)
def test_who_is_where():
    assert (bf.machine_size(), bf.local_size(), bf.is_homogeneous()) == (2, 2, True)
    assert (bf.machine_rank(), bf.local_rank()) == divmod(bf.rank(), 2)


@on_ranks(3, **TWO_BY_TWO)
def test_machines_of_unequal_size():
    assert bf.machine_size() == 2 and not bf.is_homogeneous()
    assert bf.local_size() == (2, 2, 1)[bf.rank()]
    if bf.rank() == 2:
        told(
            lambda: bf.hierarchical_neighbor_allreduce(x_of(0)),
            "a machine with one rank has no hierarchy",
            kind=AssertionError,
        )


@on_ranks(4)
def test_one_host_is_one_machine():
    assert (bf.machine_size(), bf.machine_rank(), bf.is_homogeneous()) == (1, 0, True)
    assert bf.set_machine_topology(nx.DiGraph([(0, 0)]))
    y = bf.hierarchical_neighbor_allreduce(x_of(bf.rank()))
    np.testing.assert_allclose(y, means()[0], atol=1e-15)


@on_ranks(4, **TWO_BY_TWO)
def test_machine_topology():
    told(lambda: bf.set_machine_topology(None), "there is no default")
    for wrong in (7, nx.path_graph(3, create_using=nx.DiGraph), bf.topology.ring(4)):
        with pytest.raises(TypeError):
            bf.set_machine_topology(wrong)
    told(
        lambda: bf.set_machine_topology(bf.topology.ring(4)),
        "the graph 'ring' has 4 nodes, but there are 2 machines",
        kind=TypeError,
    )
    one_way = nx.DiGraph([(0, 1)])
    assert bf.set_machine_topology(one_way) is True
    assert bf.load_machine_topology() is one_way
    assert not bf.is_machine_topo_weighted()
    assert bf.in_neighbor_machine_ranks() == ([], [0])[bf.machine_rank()]
    assert bf.out_neighbor_machine_ranks() == ([1], [])[bf.machine_rank()]
    check_average(np.array([[1.0, 0.5], [0.0, 0.5]]))  # 1 / (in-degree + 1).

    bf.init()  # Resets the ranks' graph, and not the machines'.
    assert bf.load_machine_topology() is one_way

    weighted = nx.DiGraph()
    weighted.add_weighted_edges_from([(0, 0, 0.75), (1, 1, 0.5), (0, 1, 0.5), (1, 0, 0.25)])
    assert bf.set_machine_topology(weighted, is_weighted=True)
    assert bf.is_machine_topo_weighted()
    check_average(nx.to_numpy_array(weighted, nodelist=range(2)))
    assert bf.set_machine_topology("ring") and bf.is_machine_topo_weighted()
    check_average(np.full((2, 2), 0.5))


@on_ranks(4, **TWO_BY_TWO)
def test_weights_of_a_call():
    machine, other = bf.machine_rank(), 1 - bf.machine_rank()
    x = x_of(bf.rank())
    m = means()
    y = bf.hierarchical_neighbor_allreduce(
        x, self_weight=0.25, src_machine_weights={other: 0.5}, dst_machine_weights={other: 3.0}
    )
    np.testing.assert_allclose(y, 0.25 * m[machine] + 1.5 * m[other], atol=1e-14)
    y = bf.hierarchical_neighbor_allreduce(
        x, self_weight=0.5, src_machine_weights={other: 0.5}, dst_machine_weights=[other]
    )
    np.testing.assert_allclose(y, 0.5 * m[machine] + 0.5 * m[other], atol=1e-14)
    # One way only, and nobody at all.
    sends = machine == 0
    y = bf.hierarchical_neighbor_allreduce(
        x,
        self_weight=0.5,
        src_machine_weights={} if sends else {0: 0.5},
        dst_machine_weights=[1] if sends else [],
    )
    np.testing.assert_allclose(y, 0.5 * m[machine] + (0 if sends else 0.5 * m[0]), atol=1e-14)
    y = bf.hierarchical_neighbor_allreduce(
        x, self_weight=2.0, src_machine_weights={}, dst_machine_weights={}
    )
    np.testing.assert_allclose(y, 2.0 * m[machine], atol=1e-14)


@on_ranks(4, **TWO_BY_TWO)
def test_wrong_calls():
    x = x_of(0)
    own, other = bf.machine_rank(), 1 - bf.machine_rank()
    for weights in (
        {"self_weight": 0.5},
        {"self_weight": 0.5, "src_machine_weights": {other: 0.5}},
        {"dst_machine_weights": [other]},
        {"src_machine_weights": {other: 0.5}, "dst_machine_weights": [other]},
    ):
        told(lambda w=weights: bf.hierarchical_neighbor_allreduce(x, **w), "together, or none")
    for src, text in (({2: 1.0}, "machine 2 is outside 0..1"), ({own: 1.0}, "names this machine")):
        told(
            lambda s=src: bf.hierarchical_neighbor_allreduce(
                x, self_weight=0.5, src_machine_weights=s, dst_machine_weights=[]
            ),
            "src_machine_weights",
            text,
        )
    told(
        lambda: bf.hierarchical_neighbor_allreduce(
            x, self_weight=0.5, src_machine_weights={}, dst_machine_weights=[other, other]
        ),
        f"dst_machine_weights names machine {other} twice",
    )
    with pytest.raises(TypeError):
        bf.hierarchical_neighbor_allreduce(x, neighbor_machine_weights={other: 1.0})
    # Afterwards everything works at once.
    np.testing.assert_allclose(bf.allreduce(np.ones(3)), np.ones(3))


@on_ranks(4, **TWO_BY_TWO)
def test_local_allreduce():
    first = 2 * bf.machine_rank()
    for shape in ((), (0,), (5, 3), (50_000,)):
        pair = np.stack([x_of(first, shape), x_of(first + 1, shape)])
        x = x_of(bf.rank(), shape)
        y = bf.allreduce(x, is_hierarchical_local=True)
        np.testing.assert_allclose(y, pair.mean(axis=0), atol=1e-15)
        y = bf.allreduce(x, average=False, is_hierarchical_local=True)
        np.testing.assert_allclose(y, pair.sum(axis=0), atol=1e-14)
        x = np.array(x)
        assert bf.allreduce_(x, is_hierarchical_local=True) is x
        np.testing.assert_allclose(x, pair.mean(axis=0), atol=1e-15)
    handle = bf.allreduce_nonblocking(np.array([bf.rank()]), False, True)
    assert bf.synchronize(handle)[0] == 2 * first + 1
    told(
        lambda: bf.allreduce(np.ones(4), name="a", is_hierarchical_local=bf.rank() == 0),
        "over its machine",
    ) if bf.machine_rank() == 0 else told(
        lambda: bf.allreduce(np.ones(4), name="a"), kind=bf.BluefogError
    )


@on_ranks(4, **TWO_BY_TWO)
def test_handles_and_torch():
    import torch

    import bluefog.torch as bft

    bft.set_machine_topology(bf.topology.ring(2))
    xs = [torch.full((n,), float(bf.rank()), dtype=torch.float64) for n in (3, 100_000)]
    handles = [bft.hierarchical_neighbor_allreduce_nonblocking(x, name=f"x{len(x)}") for x in xs]
    for x, handle in zip(reversed(xs), reversed(handles)):
        y = bft.synchronize(handle)
        assert torch.equal(y, torch.full_like(x, 1.5)) and y.dtype == x.dtype
    half = bft.hierarchical_neighbor_allreduce(torch.ones(5, dtype=torch.bfloat16) * bf.rank())
    assert torch.equal(half, torch.full((5,), 1.5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="floating-point"):
        bft.hierarchical_neighbor_allreduce(torch.ones(5, dtype=torch.int32))


@on_ranks(8, BLUEFOG_NODES_PER_MACHINE="4", BLUEFOG_TRANSPORT="ucx")
def test_eight_ranks_over_ucx():
    bf.set_machine_topology(bf.topology.ring(2))
    check_average(np.full((2, 2), 0.5))
    x = x_of(bf.rank(), (60_000,))
    mean = np.mean([x_of(r, (60_000,)) for r in range(8)], axis=0)
    y = bf.allreduce(x)
    np.testing.assert_allclose(y, mean, atol=1e-14)
    np.testing.assert_array_equal(y, bf.broadcast(y, 0))


@on_ranks(8, BLUEFOG_NODES_PER_MACHINE="2")
def test_a_sequence_between_four_machines():
    rounds = bf.topology.one_peer_exponential(4)
    bf.set_machine_topology(rounds)
    machine = bf.machine_rank()
    m = means((40_000,))
    for step in range(3):
        y = bf.hierarchical_neighbor_allreduce(x_of(bf.rank(), (40_000,)), name="x")
        w = rounds.to_matrix(step)[:, machine]
        np.testing.assert_allclose(y, np.einsum("i,ij->j", w, m), atol=1e-14)


@on_ranks(4, **TWO_BY_TWO)
def test_optimizer_over_machines():
    import torch

    import bluefog.torch as bft

    def train(communication, topology, steps=5, **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 40)
        optimizer = bft.optim.DecentLaM(
            model.named_parameters(), lr=0.05, topology=topology, communication=communication,
            **options,
        )  # fmt: skip
        torch.manual_seed(1 + bf.rank())
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().ravel() for p in model.parameters()])

    pair = np.array([[0.75, 0.25], [0.25, 0.75]])
    over = train("hierarchical_neighbor_allreduce", bf.topology.from_matrix(pair))
    ranks = bf.topology.from_matrix(np.kron(pair, np.full((2, 2), 0.5)))
    plain = train("neighbor_allreduce", ranks)
    assert torch.allclose(over, plain, atol=1e-6)
    later = train("hierarchical.neighbor.allreduce", "ring", overlap=False)
    assert not torch.equal(over, later)
    told(lambda: train("broadcast", "ring"), "communication must be")
    told(
        lambda: bft.optim.PmSGD(
            torch.nn.Linear(2, 2).parameters(), 0.1, communication="hierarchical_neighbor_allreduce"
        ),
        "uses no graph",
    )
    told(
        lambda: train("hierarchical_neighbor_allreduce", bf.topology.ring(4)),
        "4 nodes, but there are 2 machines",
    )


def test_no_machine_topology_and_the_form_by_hand():
    script = """
import numpy as np, bluefog as bf
bf.init()
try:
    bf.hierarchical_neighbor_allreduce(np.ones(3))
except RuntimeError as error:
    assert not isinstance(error, ValueError), error
    print("told", "set_machine_topology first" in str(error))
bf.set_machine_topology("ring")
print(bf.hierarchical_neighbor_allreduce(np.full(50_000, float(bf.rank())))[-1])
bf.shutdown()
assert bf.load_machine_topology() is None
"""
    for form in ("flat", "hierarchical"):
        results = run_script(4, script, BLUEFOG_HIERARCHY=form, **TWO_BY_TWO)
        for r in results:
            assert r.returncode == 0, r.stderr
            assert r.stdout.split() == ["told", "True", "1.5"]


def test_a_form_that_does_not_exist():
    result = run_script(1, "import bluefog as bf; bf.init()", BLUEFOG_HIERARCHY="deep")[0]
    assert "BLUEFOG_HIERARCHY=deep: expected auto, flat or hierarchical" in result.stderr
