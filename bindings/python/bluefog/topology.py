"""Graphs over ranks, and what can be said about them.

Every generator returns a :class:`Topology`, or a :class:`TopologySequence` where the graph changes
from round to round. ``W[i, j]`` is the weight on the edge i -> j: rank j receives
``sum_i W[i, j] * x_i``. Not to be confused with communication: nothing here talks to other ranks.

``n`` is the number of ranks everywhere, at least 1. A generator that cannot make a graph of this
size raises ValueError, which says what would do.

>>> from bluefog import topology
>>> topology.ring(8).analyze().spectral_gap  # doctest: +ELLIPSIS
0.195...
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import numpy as np

from . import _core
from ._core import Topology, TopologyAnalysis, TopologySequence
from ._errors import BluefogSizeError, BluefogValueError, as_int

__all__ = [
    "Topology",
    "TopologyAnalysis",
    "TopologySequence",
    "erdos_renyi",
    "exponential",
    "from_matrix",
    "from_networkx",
    "fully_connected",
    "hypercube",
    "make",
    "mesh_grid_2d",
    "metropolis_hastings",
    "names",
    "one_peer_exponential",
    "one_peer_hypercube",
    "ring",
    "ring_left",
    "ring_right",
    "star",
    "symmetric_exponential",
    "to_networkx",
    "torus_2d",
    "uniform",
]

AnyTopology = Union[Topology, TopologySequence]

_RING_STYLES = {"both": 0, "left": 1, "right": 2}


def ring(n: int, style: str | int = "both") -> Topology:
    """Ring: weight 1/3 on self and both neighbours, or 1/2 on self and one.

    Parameters
    ----------
    n : int
        Number of ranks.
    style : {"both", "left", "right"} or {0, 1, 2}
        "left": i sends to i-1; "right": i sends to i+1 (directed).

    Raises
    ------
    ValueError
        Another style.
    """
    if isinstance(style, str):
        if style not in _RING_STYLES:
            raise BluefogValueError(f"ring style {style!r} is not one of {sorted(_RING_STYLES)}")
        style = _RING_STYLES[style]
    return _core.ring(as_int(n, "n"), as_int(style, "ring style"))


def ring_left(n: int) -> Topology:
    """One-way ring: i sends to i-1, weights 1/2."""
    return ring(n, "left")


def ring_right(n: int) -> Topology:
    """One-way ring: i sends to i+1, weights 1/2."""
    return ring(n, "right")


def exponential(n: int, base: int = 2) -> Topology:
    """Static exponential graph: i sends to i + base**k (mod n), all weights equal. Directed.

    Source: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training"
    (2021), for base 2.
    """
    return _core.exponential(as_int(n, "n"), as_int(base, "base"))


def symmetric_exponential(n: int, base: int = 4) -> Topology:
    """Neighbours at distance base**k in both directions, all weights equal."""
    return _core.symmetric_exponential(as_int(n, "n"), as_int(base, "base"))


def mesh_grid_2d(n: int, rows: int = 0) -> Topology:
    """Grid of ``rows`` x n/rows (0: as square as possible) with Metropolis-Hastings weights.

    ValueError if ``rows`` does not divide n.
    """
    return _core.mesh_grid_2d(as_int(n, "n"), as_int(rows, "rows"))


def torus_2d(n: int, rows: int = 0) -> Topology:
    """The grid closed to a torus (0 rows: as square as possible); else as :func:`mesh_grid_2d`."""
    return _core.torus_2d(as_int(n, "n"), as_int(rows, "rows"))


def hypercube(n: int) -> Topology:
    """Hypercube; n must be a power of 2."""
    return _core.hypercube(as_int(n, "n"))


def star(n: int, center: int = 0) -> Topology:
    """All ranks exchange with ``center`` at weight 1/n; the others keep 1 - 1/n.

    ValueError if ``center`` is not a rank.
    """
    return _core.star(as_int(n, "n"), as_int(center, "center"))


def fully_connected(n: int) -> Topology:
    """Everybody with everybody, 1/n: one step is the exact average."""
    return _core.fully_connected(as_int(n, "n"))


def erdos_renyi(n: int, p: float | None = None, seed: int = 0) -> Topology:
    """Random graph G(n, p) with Metropolis-Hastings weights, redrawn until connected.

    ``p``: probability of an edge; None: that of ``bluefog topo erdos-renyi``, 1.5 ceil(log2 n) / n.
    The same ``seed`` gives the same graph on every rank. ValueError if p is not in [0, 1], or so
    small that 1000 draws are not connected.
    """
    if p is None:
        return make("erdos-renyi", n).at(0)
    return _core.erdos_renyi(as_int(n, "n"), float(p), as_int(seed, "seed"))


def one_peer_exponential(n: int) -> TopologySequence:
    """Round t: i sends to i + 2**(t mod ceil(log2 n)), weights 1/2. Directed, dynamic.

    One message per step; for n a power of 2 the product over a period is the exact average.
    Source: Assran et al., "Stochastic Gradient Push for Distributed Deep Learning" (2019).
    """
    return _core.one_peer_exponential(as_int(n, "n"))


def one_peer_hypercube(n: int) -> TopologySequence:
    """Round t: i exchanges with i XOR 2**t, weights 1/2; n must be a power of 2. Dynamic."""
    return _core.one_peer_hypercube(as_int(n, "n"))


def names() -> list[str]:
    """Names that :func:`make` and ``bluefog topo`` know."""
    return _core.topology_names()


def make(name: str, n: int) -> TopologySequence:
    """A generator by its name, as on the command line (hyphens and underscores are alike).

    ValueError lists the names if there is none of this one.
    """
    return _core.make_topology(name, as_int(n, "n"))


def from_matrix(matrix: Any, name: str = "custom") -> Topology:
    """A graph from its weights.

    Parameters
    ----------
    matrix : array_like, float[n, n]
        ``matrix[i, j]``: weight on the edge i -> j; 0 means no edge.
    name : str
        For messages and pictures.

    Raises
    ------
    ValueError
        Not square, or an entry that is negative or not finite (named by row and column).
    """
    array = np.asarray(matrix)
    if array.dtype.kind not in "fiubO":
        raise TypeError(f"a topology's matrix must hold real numbers, not {array.dtype}")
    return _core.topology_from_matrix(array.astype(np.float64), name)


def from_networkx(graph: Any, name: str = "networkx") -> Topology:
    """A graph from networkx, whose nodes are the ranks 0 … n-1.

    The edges' ``weight`` attributes are taken as they are, self-loops included. Where no edge has
    one, an undirected graph gets Metropolis-Hastings weights and a directed one uniform weights.

    Parameters
    ----------
    graph : networkx.Graph or networkx.DiGraph
    name : str
        For messages and pictures.

    Raises
    ------
    ValueError
        Nodes that are not 0 … n-1; weights on some edges only; a negative weight.
    """
    n = _node_count(graph)
    weights = [w for *_, w in graph.edges(data="weight")]
    given = [w is not None for w in weights]
    if not any(given):
        return (uniform if graph.is_directed() else metropolis_hastings)(graph, name)
    if not all(given):
        edge = list(graph.edges())[given.index(False)]
        raise BluefogValueError(
            f"edge {edge[0]} -> {edge[1]} has no 'weight' although others have one; give all edges "
            "a weight, or none"
        )
    edges = []
    for u, v, w in graph.edges(data="weight"):
        if not isinstance(w, numbers.Real):
            raise TypeError(f"the 'weight' of edge {u} -> {v} is {w!r}; it must be a number")
        edges.append((int(u), int(v), float(w)))
        if not graph.is_directed() and u != v:
            edges.append((int(v), int(u), float(w)))
    return _core.topology_from_edges(n, edges, name)


def metropolis_hastings(graph: Any, name: str = "custom") -> Topology:
    """Metropolis-Hastings weights on an undirected graph: symmetric and doubly stochastic.

    w_ij = 1 / max(d_i, d_j) with degrees that count the rank itself; the rest stays at i.
    Source: Xiao, Boyd and Kim, "Distributed average consensus with least-mean-square deviation"
    (2007).

    Parameters
    ----------
    graph : networkx graph, array_like[n, n], mapping or sequence of neighbour lists
        Only which edges exist matters. A directed graph must have both directions of every edge.

    Raises
    ------
    ValueError
        An edge in one direction only (named), or a node that is not a rank.
    """
    return _core.metropolis_hastings(_adjacency(graph), name)


def uniform(graph: Any, name: str = "custom") -> Topology:
    """Every rank gives itself and each of its sources 1 / (in-degree + 1).

    Doubly stochastic on regular graphs only. ``graph`` as in :func:`metropolis_hastings`, but may
    be directed (neighbour lists are destinations).
    """
    return _core.uniform_weights(_adjacency(graph), name)


def to_networkx(topology: AnyTopology) -> Any:
    """A ``networkx.DiGraph`` with edge attribute ``weight`` and self-loops.

    Of a sequence: the union of all rounds, with the mean of the weights over a period.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise ImportError(
            "graphs as networkx objects (load_topology, to_networkx) need the package networkx: "
            "pip install 'bluefog[networkx]'"
        ) from error

    matrix = _mean_matrix(topology)
    graph = nx.DiGraph(name=topology.name)
    graph.add_nodes_from(range(topology.size))
    graph.add_weighted_edges_from(
        (int(i), int(j), float(matrix[i, j])) for i, j in zip(*np.nonzero(matrix))
    )
    return graph


def as_sequence(
    topology: Any, size: int, is_weighted: bool = False, nodes: str = "ranks"
) -> TopologySequence:
    """What ``set_topology`` and the optimizers accept, as a sequence over ``size`` ranks.

    ``nodes``: what the size counts, for messages.
    """
    if isinstance(topology, str):
        sequence = make(topology, size)
    elif isinstance(topology, TopologySequence):
        sequence = topology
    elif isinstance(topology, Topology):
        sequence = _core.as_sequence(topology)
    elif _is_networkx(topology):
        if topology.number_of_nodes() != size:  # Before the labels: the clearer complaint.
            _raise_size(topology.name or "networkx", topology.number_of_nodes(), size, nodes)
        sequence = _core.as_sequence(
            from_networkx(topology) if is_weighted else uniform(topology, "networkx")
        )
    elif isinstance(topology, np.ndarray):
        sequence = _core.as_sequence(from_matrix(topology))
    else:
        raise TypeError(
            "a topology must be a networkx.DiGraph, a NumPy matrix, one of bluefog.topology or its "
            f"name, not {type(topology).__name__}"
        )
    if sequence.size != size:
        _raise_size(sequence.name, sequence.size, size, nodes)
    return sequence


def neighbors(topology: AnyTopology, rank: int) -> tuple[list[int], list[int]]:
    """(sources, destinations) of a rank, ascending; of a sequence: over all rounds."""
    rounds = _rounds(topology)
    sources: set[int] = set().union(*(t.in_neighbors(rank) for t in rounds))
    destinations: set[int] = set().union(*(t.out_neighbors(rank) for t in rounds))
    return sorted(sources), sorted(destinations)


def _rounds(topology: AnyTopology) -> list[Topology]:
    if isinstance(topology, Topology):
        return [topology]
    return [topology.at(r) for r in range(topology.period)]


def _mean_matrix(topology: AnyTopology) -> np.ndarray:
    rounds = _rounds(topology)
    if len(rounds) == 1:
        return rounds[0].to_matrix()
    return np.mean([t.to_matrix() for t in rounds], axis=0)


def _raise_size(name: str, count: int, size: int, nodes: str) -> None:
    raise BluefogSizeError(f"the graph '{name}' has {count} nodes, but there are {size} {nodes}")


def _is_networkx(graph: Any) -> bool:
    return all(hasattr(graph, a) for a in ("nodes", "edges", "is_directed", "number_of_nodes"))


def _node_count(graph: Any) -> int:
    n = graph.number_of_nodes()
    for node in graph.nodes:
        if isinstance(node, bool) or not isinstance(node, (int, np.integer)) or not 0 <= node < n:
            raise BluefogValueError(
                f"node {node!r} is not a rank: a graph of {n} nodes must have the nodes 0..{n - 1}"
            )
    return n


def _adjacency(graph: Any) -> list[list[int]]:
    if _is_networkx(graph):
        n = _node_count(graph)
        lists: Iterable[Iterable[int]] = (graph.adj[i] for i in range(n))
    elif isinstance(graph, np.ndarray):
        if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
            raise BluefogValueError(f"an adjacency matrix must be n x n, this one is {graph.shape}")
        lists = (np.flatnonzero(row) for row in graph)
    elif isinstance(graph, Mapping):
        lists = (graph[i] for i in range(len(graph)))
    elif isinstance(graph, Sequence) and not isinstance(graph, str):
        lists = graph
    else:
        raise TypeError(
            "a graph must be a networkx graph, a NumPy matrix or neighbour lists, not "
            + type(graph).__name__
        )
    return [sorted({int(j) for j in row} - {i}) for i, row in enumerate(lists)]
