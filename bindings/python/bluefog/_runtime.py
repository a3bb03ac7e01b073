"""The one communicator of this process, its topology and the handles of operations under way."""

from __future__ import annotations

import atexit
import itertools
import threading
from typing import Any, Callable

from . import _core
from . import topology as _topology
from ._errors import BluefogError, BluefogSizeError, BluefogValueError

_lock = threading.Lock()
_communicator: _core.Communicator | None = None
# The networkx graphs that set_topology and set_machine_topology were given, if they were such; and
# whether their weights count.
_graph: Any = None
_machine_graph: Any = None
_weighted, _machine_weighted = False, False
# An operation under way, and what makes its result of it.
Pending = tuple[_core.Work, Callable[[_core.Work], Any]]
_handles: dict[int, Pending] = {}
_next_handle = itertools.count(1)


def communicator() -> _core.Communicator:
    """The communicator; raises before init and after shutdown."""
    current = _communicator
    if current is None:
        raise BluefogValueError(
            "bluefog is not running in this process (before init() or after shutdown()): use "
            "bf.init() first",
            "FAILED_PRECONDITION",
        )
    return current


def located(error: Exception, operation: str, name: Any = None) -> Exception:
    """The error with rank, operation and tensor at the head, as the engine writes them."""
    text = str(error)
    if getattr(error, "code", "") == "FAILED_PRECONDITION" or text.startswith("rank "):
        return error
    head = f"rank {communicator().rank}: "
    if not text.startswith("tensor "):
        head += operation + (f" {name!r}" if name else "") + ": "
    kind = type(error)
    if kind not in (TypeError, AssertionError, BluefogValueError, BluefogSizeError):
        kind = BluefogValueError  # UnicodeError has other arguments.
    return kind(head + text).with_traceback(error.__traceback__)


def is_initialized() -> bool:
    """True between ``init()`` and ``shutdown()``, but not in a forked child."""
    return _communicator is not None and not _core.in_forked_child()


def init(topology_fn: Callable[[int], Any] | None = None, is_weighted: bool = False) -> None:
    """Join the job that the launcher describes, or be alone, and set the topology.

    Finds its place under ``bluefog run`` and from torchrun's variables; without either it is rank 0
    of 1. Settings are read from ``BLUEFOG_*`` variables at the first call. Every call resets the
    topology; calling it again is otherwise without effect.

    Parameters
    ----------
    topology_fn : callable, optional
        ``topology_fn(size)`` returns whatever :func:`set_topology` accepts. Default: the static
        exponential graph.
    is_weighted : bool
        Whether the weights of a networkx graph are used; see :func:`set_topology`.

    Raises
    ------
    BluefogError
        Ranks that did not join in time (named), a port that is taken, or a forked child.
    ValueError
        A malformed variable (named, with its value).
    """
    global _communicator
    if topology_fn is not None and not callable(topology_fn):
        raise TypeError(
            "init: topology_fn must be a function of the number of ranks, not "
            + type(topology_fn).__name__
        )
    with _lock:
        if _communicator is None:
            _communicator = _core.Communicator.create()
            atexit.register(_at_exit)
    set_topology(None if topology_fn is None else topology_fn(size()), is_weighted)


def shutdown() -> None:
    """Leave the job. Scripts need not call it: it happens at exit. ``init()`` may follow."""
    global _communicator, _graph, _machine_graph, _machine_weighted
    if _core.in_forked_child() and _communicator is not None:
        _communicator.shutdown()  # Raises; the lock may be held for ever here.
    with _lock:
        current, _communicator, _graph = _communicator, None, None
        _machine_graph, _machine_weighted = None, False
        _handles.clear()
        atexit.unregister(_at_exit)
    if current is not None:
        current.shutdown()


def _at_exit() -> None:
    # A forked child leaves its parent's job alone.
    if not _core.in_forked_child():
        shutdown()


def rank() -> int:
    """My number, 0 … size-1. ValueError before ``init()``."""
    return communicator().rank


def size() -> int:
    """Number of ranks in the job. ValueError before ``init()``."""
    return communicator().size


def local_rank() -> int:
    """My number among the ranks of this machine. ValueError before ``init()``."""
    return communicator().local_rank


def local_size() -> int:
    """Number of ranks on this machine. ValueError before ``init()``."""
    return communicator().local_size


def machine_rank() -> int:
    """The number of this machine, 0 … machine_size-1. ValueError before ``init()``."""
    return communicator().machine_rank


def machine_size() -> int:
    """Number of machines: hosts, or what BLUEFOG_NODES_PER_MACHINE makes look like them.

    ValueError before ``init()``.
    """
    return communicator().machine_size


def is_homogeneous() -> bool:
    """True if all machines have the same number of ranks. ValueError before ``init()``."""
    return communicator().is_homogeneous


def launched_by() -> str:
    """Where this rank's place came from: "bluefog run", "torchrun" or "alone"."""
    return communicator().launched_by


def stats() -> dict[str, int]:
    """Counters of this rank's engine since ``init()``.

    Returns
    -------
    dict
        ``ops_submitted``, ``ops_done``, ``ops_failed``; ``messages_sent`` and ``bytes_sent`` of
        data, ``posts_sent`` (announcements of large messages), ``nacks_sent`` (refusals),
        ``control_messages``; ``allocations`` (stays the same once warm); ``bytes_pinned`` of shared
        memory; ``nonfinite_gradients`` (elements); ``busy_ns``, the time in which the result of an
        exchange was still to come, and ``blocked_ns``, the time spent waiting, in nanoseconds:
        ``1 - blocked_ns / busy_ns`` is the hidden share of communication.

    Raises
    ------
    ValueError
        Before ``init()``.
    """
    return communicator().stats()


def set_topology(topology: Any = None, is_weighted: bool = False) -> bool:
    """Set the graph that neighbour averages use from now on.

    Every rank calls it at the same point of its program with the same graph. Rows that do not sum
    to 1 and disconnected graphs are warned about.

    Parameters
    ----------
    topology : networkx graph, numpy.ndarray, Topology, TopologySequence or its name, optional
        Default: the static exponential graph. The round of a sequence is the number of
        neighbor_allreduces under the same name since this call (those with ``dst_weights``, which
        go along no topology, do not count); that of an optimizer is its step.
    is_weighted : bool
        For a networkx graph: use its ``weight`` attributes; else every rank averages itself and its
        sources with 1 / (in-degree + 1). Matrices and objects of :mod:`bluefog.topology` carry
        their weights with them, and these are used.

    Returns
    -------
    bool
        True.

    Raises
    ------
    TypeError
        Not a graph, or (also a ValueError) another number of nodes than ranks.
    ValueError
        A negative weight, or a node that is not a rank.
    """
    global _graph, _weighted
    current = communicator()
    weighted = _carries_weights(topology, is_weighted)
    if topology is None:
        topology = _topology.exponential(current.size)
    try:
        sequence = _topology.as_sequence(topology, current.size, is_weighted)
    except (TypeError, ValueError) as error:
        raise located(error, "set_topology") from None
    # Of a sequence, the round begins anew.
    if sequence.period > 1 or sequence != current.topology():
        current.set_topology(sequence)
    _graph = topology if hasattr(topology, "nodes") else None
    _weighted = weighted
    return True


def _carries_weights(topology: Any, is_weighted: bool) -> bool:
    return bool(is_weighted) or not (topology is None or hasattr(topology, "nodes"))


def set_machine_topology(topology: Any, is_weighted: bool = False) -> bool:
    """Set the graph between machines that ``hierarchical_neighbor_allreduce`` uses from now on.

    Every rank calls it at the same point of its program with the same graph. ``init()`` leaves it
    alone; there is none until it is set.

    Parameters
    ----------
    topology, is_weighted
        As in :func:`set_topology`; the nodes are machines.

    Returns
    -------
    bool
        True.

    Raises
    ------
    ValueError
        No topology (None), a negative weight, or a node that is not a machine.
    TypeError
        Not a graph, or (also a ValueError) another number of nodes than machines.
    """
    global _machine_graph, _machine_weighted
    current = communicator()
    try:
        if topology is None:
            raise BluefogValueError("there is no default: give a graph with a node per machine")
        sequence = _topology.as_sequence(topology, current.machine_size, is_weighted, "machines")
    except (TypeError, ValueError) as error:
        raise located(error, "set_machine_topology") from None
    current.set_machine_topology(sequence)
    _machine_graph = topology if hasattr(topology, "nodes") else None
    _machine_weighted = _carries_weights(topology, is_weighted)
    return True


def load_machine_topology() -> Any:
    """The graph between machines, as in :func:`load_topology`; None where none was set."""
    if _communicator is None:
        return None
    if _machine_graph is not None:
        return _machine_graph
    current = _communicator.machine_topology()
    return None if current is None else _topology.to_networkx(current)


def is_topo_weighted() -> bool:
    """Whether the topology's own weights are used, rather than 1 / (in-degree + 1)."""
    return _communicator is not None and _weighted


def is_machine_topo_weighted() -> bool:
    """The same of the topology of machines."""
    return _communicator is not None and _machine_weighted


def _machine_neighbors(which: int) -> list[int]:
    current = None if _communicator is None else _communicator.machine_topology()
    if _communicator is None or current is None:
        return []
    return _topology.neighbors(current, _communicator.machine_rank)[which]


def in_neighbor_machine_ranks() -> list[int]:
    """Machines that this one receives from, ascending, without itself; [] where none are set."""
    return _machine_neighbors(0)


def out_neighbor_machine_ranks() -> list[int]:
    """Machines that this one sends to, ascending, without itself; [] where none are set."""
    return _machine_neighbors(1)


def load_topology() -> Any:
    """The current graph as a ``networkx.DiGraph`` with weights; None before ``init()``.

    The graph that was given, if it was networkx's. Of a sequence: the union of its rounds, with
    mean weights.
    """
    if _communicator is None:
        return None
    return _graph if _graph is not None else _topology.to_networkx(_communicator.topology())


def in_neighbor_ranks() -> list[int]:
    """Ranks that I receive from, ascending, without myself; [] before ``init()``."""
    if _communicator is None:
        return []
    return _topology.neighbors(_communicator.topology(), _communicator.rank)[0]


def out_neighbor_ranks() -> list[int]:
    """Ranks that I send to, ascending, without myself; [] before ``init()``."""
    if _communicator is None:
        return []
    return _topology.neighbors(_communicator.topology(), _communicator.rank)[1]


def add_handle(pending: Pending) -> int:
    """Keep an operation under a new handle."""
    handle = next(_next_handle)
    _handles[handle] = pending
    return handle


def poll(handle: int) -> bool:
    """True when the operation is complete, so that ``synchronize`` will not block.

    Parameters
    ----------
    handle : int
        What a nonblocking operation returned. It stays usable.

    Raises
    ------
    ValueError
        The handle is unknown or was used before.
    """
    return _work(handle)[0].done()


def synchronize(handle: int) -> Any:
    """Wait for a nonblocking operation and return its output. A handle can be used once.

    Answers Ctrl-C; the handle then stays usable.

    Parameters
    ----------
    handle : int
        What a nonblocking operation returned.

    Returns
    -------
    tensor
        A new one; of an in-place operation the tensor that was given.

    Raises
    ------
    ValueError
        The handle is unknown or was used before; or the ranks' arguments do not fit together.
    BluefogError
        The operation failed; ``code`` says how.
    """
    work, finish = _work(handle)
    try:
        work.wait()
    except BluefogError:
        _handles.pop(handle, None)
        raise
    _handles.pop(handle, None)
    return finish(work)


def complete(pending: Pending) -> Any:
    """Wait for an operation that never had a handle, and return its output."""
    work, finish = pending
    work.wait()
    return finish(work)


def wait(handle: int) -> Any:
    """The same as :func:`synchronize`."""
    return synchronize(handle)


def barrier() -> None:
    """Return when every rank has called it.

    Raises
    ------
    BluefogError
        A rank died or left (``code`` "UNAVAILABLE"), or one never called.
    """
    work = communicator().submit(_core.Op.barrier)
    assert work is not None  # Only a tensor with gaps has none.
    work.wait()


def _work(handle: int) -> Pending:
    try:
        return _handles[handle]
    except (KeyError, TypeError):
        communicator()  # The clearer complaint after a shutdown.
        raise BluefogValueError(
            f"handle {handle!r} is unknown or was used before: every handle of a nonblocking "
            "operation can be synchronized once"
        ) from None
