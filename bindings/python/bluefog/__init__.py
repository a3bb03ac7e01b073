"""Decentralized deep learning: neighbour averaging that overlaps with back-propagation.

This module works on NumPy arrays (and reads anything with ``__dlpack__``); ``bluefog.torch``
offers the same functions on PyTorch tensors, and the optimizers.

>>> import numpy as np
>>> import bluefog as bf
>>> bf.init()
>>> bf.neighbor_allreduce(np.array([float(bf.rank())]))  # doctest: +SKIP
"""

from __future__ import annotations

from . import topology
from ._core import __version__
from ._errors import BluefogError, BluefogSizeError, BluefogValueError
from ._numpy import api as _api
from ._runtime import (
    barrier,
    in_neighbor_machine_ranks,
    in_neighbor_ranks,
    init,
    is_homogeneous,
    is_initialized,
    is_machine_topo_weighted,
    is_topo_weighted,
    launched_by,
    load_machine_topology,
    load_topology,
    local_rank,
    local_size,
    machine_rank,
    machine_size,
    out_neighbor_machine_ranks,
    out_neighbor_ranks,
    poll,
    rank,
    set_machine_topology,
    set_topology,
    shutdown,
    size,
    stats,
    synchronize,
    wait,
)

allgather = _api.allgather
allgather_nonblocking = _api.allgather_nonblocking
allreduce = _api.allreduce
allreduce_ = _api.allreduce_
allreduce_nonblocking = _api.allreduce_nonblocking
allreduce_nonblocking_ = _api.allreduce_nonblocking_
allreduce_parameters = _api.allreduce_parameters
broadcast = _api.broadcast
broadcast_ = _api.broadcast_
broadcast_nonblocking = _api.broadcast_nonblocking
broadcast_nonblocking_ = _api.broadcast_nonblocking_
broadcast_parameters = _api.broadcast_parameters
consensus = _api.consensus
consensus_distance = _api.consensus_distance
empty = _api.empty
hierarchical_neighbor_allreduce = _api.hierarchical_neighbor_allreduce
hierarchical_neighbor_allreduce_nonblocking = _api.hierarchical_neighbor_allreduce_nonblocking
neighbor_allreduce = _api.neighbor_allreduce
neighbor_allreduce_nonblocking = _api.neighbor_allreduce_nonblocking

__all__ = [
    "BluefogError",
    "BluefogSizeError",
    "BluefogValueError",
    "__version__",
    "allgather",
    "allgather_nonblocking",
    "allreduce",
    "allreduce_",
    "allreduce_nonblocking",
    "allreduce_nonblocking_",
    "allreduce_parameters",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_nonblocking",
    "broadcast_nonblocking_",
    "broadcast_parameters",
    "consensus",
    "consensus_distance",
    "empty",
    "hierarchical_neighbor_allreduce",
    "hierarchical_neighbor_allreduce_nonblocking",
    "in_neighbor_machine_ranks",
    "in_neighbor_ranks",
    "init",
    "is_homogeneous",
    "is_initialized",
    "is_machine_topo_weighted",
    "is_topo_weighted",
    "launched_by",
    "load_machine_topology",
    "load_topology",
    "local_rank",
    "local_size",
    "machine_rank",
    "machine_size",
    "neighbor_allreduce",
    "neighbor_allreduce_nonblocking",
    "out_neighbor_machine_ranks",
    "out_neighbor_ranks",
    "poll",
    "rank",
    "set_machine_topology",
    "set_topology",
    "shutdown",
    "size",
    "stats",
    "synchronize",
    "topology",
    "wait",
]
