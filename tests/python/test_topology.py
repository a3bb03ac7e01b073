"""bluefog.topology and bluefog.viz, without ranks."""

import networkx as nx
import numpy as np
import pytest

from bluefog import topology, viz


def test_generators():
    for make, n, options in (
        (topology.ring, 8, {}),
        (topology.exponential, 8, {}),
        (topology.symmetric_exponential, 12, {}),
        (topology.mesh_grid_2d, 6, {}),
        (topology.torus_2d, 9, {}),
        (topology.hypercube, 8, {}),
        (topology.star, 5, {"center": 2}),
        (topology.fully_connected, 4, {}),
        (topology.erdos_renyi, 7, {"p": 0.4, "seed": 3}),
        (topology.one_peer_exponential, 8, {}),
        (topology.one_peer_hypercube, 8, {}),
    ):
        graph = make(n, **options)
        assert graph.size == n
        analysis = graph.analyze()
        assert analysis.doubly_stochastic and analysis.connected, make
        assert not analysis.problem
    assert topology.one_peer_exponential(8).analyze().exact_average
    assert topology.ring(8).analyze().symmetric
    assert topology.ring(8).analyze().spectral_gap == pytest.approx((2 - 2**0.5) / 3)
    assert not topology.exponential(8).analyze().symmetric
    mesh = topology.mesh_grid_2d(6).to_matrix()
    assert mesh[0, [0, 1, 3]] == pytest.approx([5 / 12, 1 / 4, 1 / 3])
    # i sends to i - 1: the weight stands in row i.
    assert topology.ring(4, "left").out_neighbors(0) == {3: 0.5}
    assert topology.ring(4, "right").in_neighbors(0) == {3: 0.5}
    assert topology.erdos_renyi(7, 0.4, 3) == topology.erdos_renyi(7, 0.4, 3)
    for name in topology.names():
        assert topology.make(name, 8).size == 8
    assert topology.make("mesh-grid-2d", 6) == topology.make("mesh_grid_2d", 6)


def test_objects():
    graph = topology.star(4)
    assert graph.self_weight(2) == 0.75 and graph.in_neighbors(2) == {0: 0.25}
    assert graph.weight(0, 1) == 0.25 and graph.weight(1, 2) == 0.0
    assert len(graph) == 4 and "star" in repr(graph)
    sequence = topology.TopologySequence([topology.ring(4), graph], name="two")
    assert (sequence.period, sequence.size, sequence.is_static) == (2, 4, False)
    assert sequence.at(3) == graph and "period 2" in repr(sequence)
    assert topology.neighbors(sequence, 1) == ([0, 2], [0, 2])
    with pytest.raises(ValueError, match="rank 4"):
        graph.in_neighbors(4)
    with pytest.raises(ValueError, match="negative"):
        sequence.at(-1)


def test_from_what_users_have():
    matrix = np.array([[0.5, 0.5], [0.25, 0.75]])
    graph = topology.from_matrix(matrix.tolist())
    np.testing.assert_array_equal(graph.to_matrix(), matrix)
    assert graph.in_neighbors(0) == {1: 0.25}
    back = topology.from_networkx(topology.to_networkx(graph))
    np.testing.assert_array_equal(back.to_matrix(), matrix)
    # Without weights: Metropolis-Hastings, or uniform where directed.
    path = nx.path_graph(3)
    np.testing.assert_allclose(
        topology.from_networkx(path).to_matrix(), topology.mesh_grid_2d(3, rows=1).to_matrix()
    )
    for graph in (path, [[1], [0, 2], [1]], {0: [1], 1: [0, 2], 2: [1]}, nx.to_numpy_array(path)):
        assert topology.metropolis_hastings(graph) == topology.from_networkx(path)
        assert topology.uniform(graph).in_neighbors(1) == pytest.approx({0: 1 / 3, 2: 1 / 3})
    directed = nx.DiGraph([(0, 1), (1, 2), (2, 0)])
    assert topology.from_networkx(directed) == topology.ring(3, "right")
    union = topology.to_networkx(topology.one_peer_exponential(4))
    assert union[0][2]["weight"] == 0.25


def test_bad_input():
    half = nx.path_graph(3)
    half[0][1]["weight"] = 1.0
    for call, text in (
        (lambda: topology.from_matrix([[1.0, 2.0]]), r"n x n"),
        (lambda: topology.from_matrix([[1, -1], [0, 1]]), r"-1"),
        (lambda: topology.from_matrix([[1, np.inf], [0, 1]]), r"inf"),
        (lambda: topology.from_networkx(half), "1 -> 2"),
        (lambda: topology.from_networkx(nx.Graph([("a", "b")])), "'a'"),
        (lambda: topology.from_networkx(nx.Graph([(1, 2)])), "0..1"),
        (lambda: topology.hypercube(6), "6"),
        (lambda: topology.ring(0), "0"),
        (lambda: topology.ring(4, "up"), "up"),
        (lambda: topology.make("rong", 4), "ring"),
        (lambda: topology.metropolis_hastings([[1], []]), "1"),
        (lambda: topology.uniform([[5]]), "5"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="int"):
        topology.uniform(3)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for i, graph in enumerate(
        (topology.ring(8), topology.exponential(5), topology.one_peer_exponential(8))
    ):
        path = tmp_path / f"{i}.png"
        figure = viz.draw_topology(graph, path)
        assert path.stat().st_size > 5000
        assert len(figure.axes) == (3 if i == 2 else 1)
    curves = {"DmSGD": [[0.5, 0.7], [0.6, 0.8]], "PmSGD": [0.6, 0.8]}
    figure = viz.plot_training(curves, tmp_path / "curves.svg", title="accuracy")
    line = figure.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0.55, 0.75])
