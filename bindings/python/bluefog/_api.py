"""The operations, once for all kinds of tensors.

``Api`` holds the whole logic; what a framework's tensors need is in a small ``Adapter``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable, Generic, Protocol, TypeVar

import numpy as np

from . import _core, _runtime
from ._arguments import (
    Destinations,
    Weights,
    call_weights,
    dtype_of_messages,
    named_tensors,
    naming,
    rank_of,
)
from ._core import Op
from ._errors import BluefogError, BluefogValueError

T = TypeVar("T")


class Adapter(Protocol[T]):
    """What the operations need to know about one framework's tensors."""

    def export(self, tensor: Any, what: str, in_place: bool) -> tuple[Any, Any]:
        """Arguments ``input`` and ``owner`` of ``_core``; errors call the tensor ``what``."""

    def contiguous(self, tensor: Any) -> Any:
        """A contiguous copy of a tensor with gaps."""

    def result(self, work: _core.Work) -> T:
        """The fresh output of a completed work."""

    def modified(self, tensor: Any) -> None:
        """Called after a tensor was changed in place."""

    def empty(self, shape: Sequence[int], dtype: Any) -> T:
        """A tensor in memory that neighbours on this host read in place."""

    def named(self, params: Any) -> list[tuple[str, T]] | None:
        """The parameters of a model of this framework; None if it is not one."""

    def averaged(self, model: Any) -> list[tuple[str, T]]:
        """What ``consensus`` averages of a model: parameters and floating-point buffers."""

    def copy(self, tensor: T) -> T: ...

    def assign(self, tensor: T, value: T) -> None: ...

    def squared_distance(self, a: T, b: T) -> float: ...

    def scalar(self, value: float) -> T:
        """A float64 tensor of one element."""


class Api(Generic[T]):
    """The functions of ``bluefog`` and of its framework modules."""

    def __init__(self, adapter: Adapter[T]) -> None:
        self._adapter = adapter

    # ---- Neighbour averages.

    def neighbor_allreduce_nonblocking(
        self,
        tensor: T,
        *,
        self_weight: float | None = None,
        src_weights: Weights | None = None,
        dst_weights: Destinations | None = None,
        enable_topo_check: bool = True,
        name: str | None = None,
        message_dtype: Any = None,
    ) -> int:
        """Start :func:`neighbor_allreduce`; parameters and errors are the same.

        The tensor must not be changed before the handle is synchronized. So with all nonblocking
        operations.

        Returns
        -------
        int
            A handle for ``synchronize``, ``wait`` and ``poll``.
        """
        return _runtime.add_handle(
            self._neighbor(tensor, name, self_weight, src_weights, dst_weights, message_dtype)
        )

    def neighbor_allreduce(
        self,
        tensor: T,
        *,
        self_weight: float | None = None,
        src_weights: Weights | None = None,
        dst_weights: Destinations | None = None,
        enable_topo_check: bool = True,
        name: str | None = None,
        message_dtype: Any = None,
    ) -> T:
        """Weighted average with the neighbours.

        ``y_i = self_weight * x_i + sum_j src_weights[j] * dst_weights_j[i] * x_j``. Without
        weights the topology of ``set_topology`` decides.

        Parameters
        ----------
        tensor : tensor of any shape, floating point
            Same shape, dtype and memory order on all ranks. It is not changed.
        self_weight, src_weights : float, {rank: float}, optional
            Come together. Without ``dst_weights`` the sources must be in-neighbours.
        dst_weights : {rank: float} or list of ranks (1.0 each), optional
            Given (also when empty), the call is dynamic: any ranks, the topology is ignored.
        enable_topo_check : bool
            Accepted for BlueFog scripts; sends and receives are always checked, without extra
            messages.
        name : str, optional
            Matches the call with those of the other ranks; default: the order of calls.
        message_dtype : str or dtype, optional
            "bfloat16" or "float16" for float32 tensors, these or "float32" for float64: what
            travels is rounded to it (to nearest even; finite values beyond the largest become
            that), half or a quarter of the bytes. Sums are made in the tensor's dtype, as ``y_i =
            t * x_i + sum_j w_ij * (Q(x_j) - Q(x_i))`` with Q the rounding, w_ij the product of both
            weights and t the sum of all, 1 as a rule: what this rank rounds away when it sends, it
            keeps. So where W is doubly stochastic the mean over the ranks stays what it was, and
            ranks that agree keep their values to the bit. Equal on all ranks. Default: the
            tensor's own.

        Returns
        -------
        tensor
            A new tensor of the same shape and dtype.

        Raises
        ------
        ValueError
            Weights that are incomplete, name this rank, a rank twice or none that exists; a
            neighbour that called with another shape, dtype, message_dtype or set of ranks; a
            message_dtype that has not fewer bits.
        BluefogError
            A neighbour died or never called; ``code`` says which.
        """
        return _runtime.complete(
            self._neighbor(tensor, name, self_weight, src_weights, dst_weights, message_dtype)
        )

    def hierarchical_neighbor_allreduce_nonblocking(
        self,
        tensor: T,
        *,
        self_weight: float | None = None,
        src_machine_weights: Weights | None = None,
        dst_machine_weights: Destinations | None = None,
        enable_topo_check: bool = False,
        name: str | None = None,
    ) -> int:
        """Start :func:`hierarchical_neighbor_allreduce`; parameters and errors are the same.

        Returns
        -------
        int
            A handle for ``synchronize``, ``wait`` and ``poll``.
        """
        return _runtime.add_handle(
            self._hierarchical(tensor, name, self_weight, src_machine_weights, dst_machine_weights)
        )

    def hierarchical_neighbor_allreduce(
        self,
        tensor: T,
        *,
        self_weight: float | None = None,
        src_machine_weights: Weights | None = None,
        dst_machine_weights: Destinations | None = None,
        enable_topo_check: bool = False,
        name: str | None = None,
    ) -> T:
        """Weighted average of the means of machines, over the graph between machines.

        With m_k the mean over the ranks of machine k, every rank of it gets, to the same bits,
        ``self_weight * m_k + sum_j src_machine_weights[j] * dst_machine_weights_j[k] * m_j``.
        Without weights the topology of ``set_machine_topology`` decides. What goes to another
        machine leaves this one once, not once for each of its ranks.

        Parameters
        ----------
        tensor : tensor of any shape, floating point
            Same shape, dtype and memory order on all ranks. It is not changed.
        self_weight, src_machine_weights : float, {machine: float}, optional
            All three come together, equal on all ranks of a machine; the topology is ignored then.
        dst_machine_weights : {machine: float} or list of machines (1.0 each), optional
            Any machines but this one.
        enable_topo_check : bool
            Accepted for BlueFog scripts; sends and receives are always checked.
        name : str, optional
            Matches the call with those of the other ranks; default: the order of calls.

        Returns
        -------
        tensor
            A new tensor of the same shape and dtype.

        Raises
        ------
        AssertionError
            This machine has one rank only: use ``neighbor_allreduce``.
        RuntimeError
            No weights were given and no topology of machines was set.
        ValueError
            Weights that are incomplete, name this machine, one twice or none that exists; a rank
            that called with another shape, dtype or set of machines.
        BluefogError
            A rank died or never called; ``code`` says which.
        """
        return _runtime.complete(
            self._hierarchical(tensor, name, self_weight, src_machine_weights, dst_machine_weights)
        )

    # ---- Global operations.

    def allreduce_nonblocking(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> int:
        """Start :func:`allreduce` (the same parameters); returns a handle for ``synchronize``."""
        return _runtime.add_handle(
            self._allreduce(tensor, name, average, is_hierarchical_local, False)
        )

    def allreduce(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> T:
        """Mean (or sum, with ``average=False``) over all ranks, the same bits on every rank.

        Over several hosts the ranks of each reduce first where that takes less time by the cost
        model (``bluefog topo --placement``), and ``BLUEFOG_HIERARCHY`` decides where it is set.

        Parameters
        ----------
        tensor : tensor of any shape, floating point; int32 and int64 with ``average=False``
            Same shape, dtype and memory order on all ranks. It is not changed.
        average : bool
            Mean or sum.
        is_hierarchical_local : bool
            Only over the ranks of this machine.
        name : str, optional
            Matches the call with those of the other ranks; default: the order of calls.

        Returns
        -------
        tensor
            A new tensor of the same shape and dtype.

        Raises
        ------
        AssertionError
            The average of integers is asked for.
        ValueError
            Another shape, dtype or operation on another rank (both values are named).
        BluefogError
            A rank died or never called; ``code`` says which.
        """
        return _runtime.complete(
            self._allreduce(tensor, name, average, is_hierarchical_local, False)
        )

    def allreduce_nonblocking_(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> int:
        """Start :func:`allreduce_` (the same parameters); returns a handle for ``synchronize``."""
        return _runtime.add_handle(
            self._allreduce(tensor, name, average, is_hierarchical_local, True)
        )

    def allreduce_(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> T:
        """:func:`allreduce` in place: overwrites ``tensor`` and returns it.

        Raises
        ------
        ValueError
            As :func:`allreduce`; also a tensor that is read-only or has gaps in memory.
        """
        return _runtime.complete(
            self._allreduce(tensor, name, average, is_hierarchical_local, True)
        )

    def broadcast_nonblocking(self, tensor: T, root_rank: int, name: str | None = None) -> int:
        """Start :func:`broadcast` (the same parameters); returns a handle for ``synchronize``."""
        return _runtime.add_handle(self._submit(Op.broadcast, tensor, name, root=root_rank))

    def broadcast(self, tensor: T, root_rank: int, name: str | None = None) -> T:
        """A copy of the tensor of ``root_rank``, on every rank.

        Parameters
        ----------
        tensor : tensor of any shape and dtype
            Same shape, dtype and memory order on all ranks. It is not changed.
        root_rank : int
            The same on all ranks.
        name : str, optional
            Matches the call with those of the other ranks; default: the order of calls.

        Returns
        -------
        tensor
            A new tensor of the same shape and dtype, on the root too.

        Raises
        ------
        ValueError
            ``root_rank`` is not a rank, or another shape, dtype or root on another rank.
        BluefogError
            A rank died or never called; ``code`` says which.
        """
        return _runtime.complete(self._submit(Op.broadcast, tensor, name, root=root_rank))

    def broadcast_nonblocking_(self, tensor: T, root_rank: int, name: str | None = None) -> int:
        """Start :func:`broadcast_` (the same parameters); returns a handle for ``synchronize``."""
        return _runtime.add_handle(
            self._submit(Op.broadcast, tensor, name, in_place=True, root=root_rank)
        )

    def broadcast_(self, tensor: T, root_rank: int, name: str | None = None) -> T:
        """:func:`broadcast` in place: overwrites ``tensor`` and returns it.

        Raises
        ------
        ValueError
            As :func:`broadcast`; also a tensor that is read-only or has gaps in memory.
        """
        return _runtime.complete(
            self._submit(Op.broadcast, tensor, name, in_place=True, root=root_rank)
        )

    def allgather_nonblocking(self, tensor: T, name: str | None = None) -> int:
        """Start :func:`allgather` (the same parameters); returns a handle for ``synchronize``."""
        return _runtime.add_handle(self._submit(Op.allgather, tensor, name))

    def allgather(self, tensor: T, name: str | None = None) -> T:
        """The tensors of all ranks, concatenated along the first dimension in rank order.

        Parameters
        ----------
        tensor : tensor of any dtype, [d, …] or 0-dim
            Same shape, dtype and memory order on all ranks. It is not changed.
        name : str, optional
            Matches the call with those of the other ranks; default: the order of calls.

        Returns
        -------
        tensor
            [size * d, …]; of 0-dim tensors [size].

        Raises
        ------
        ValueError
            Another shape or dtype on another rank (both values are named).
        BluefogError
            A rank died or never called; ``code`` says which.
        """
        return _runtime.complete(self._submit(Op.allgather, tensor, name))

    # ---- Models.

    def broadcast_parameters(self, params: Any, root_rank: int) -> None:
        """Overwrite all tensors with those of ``root_rank``.

        Parameters
        ----------
        params : dict (taken in the order of its keys), list of tensors, or list of (name, tensor)
            ``model.state_dict()``, for example. Leaves that require gradients are fine. All must be
            writable and without gaps in memory; nothing is changed where one is not. After Ctrl-C
            what was under way is still written.
        root_rank : int
            The same on all ranks.

        Raises
        ------
        ValueError
            Something else than the above; a tensor that differs in shape or dtype (named).
        """
        named = named_tensors(params)
        self._check_in_place(Op.broadcast, named)
        submit = functools.partial(
            self._submit, Op.broadcast, name=None, in_place=True, root=root_rank
        )
        for _ in self._all(named, submit):
            pass

    def allreduce_parameters(self, params: Any) -> None:
        """Overwrite all tensors with their mean over the ranks.

        Parameters and errors are those of :func:`broadcast_parameters`; floating point only. The
        tensors are overwritten when all means are there: on an error none is.
        """
        named = named_tensors(params)
        self._check_in_place(Op.allreduce, named)
        for tensor, mean in self._means(named):
            self._adapter.assign(tensor, mean)

    def consensus_distance(self, params: Any) -> float:
        """How far the ranks' models are apart: the root mean square distance to their mean.

        ``sqrt(1/n * sum_i ||x_i - mean(x)||**2)`` with x_i all parameters of rank i as one vector,
        in the parameters' own unit; the same value on every rank. Costs one all-reduce of the
        parameters' size and one of a single number.

        Parameters
        ----------
        params : model, dict, list of tensors, or list of (name, tensor)

        Returns
        -------
        float

        Raises
        ------
        ValueError
            A parameter that differs in shape or dtype between the ranks (named).
        """
        named = self._adapter.named(params)
        if named is None:
            named = named_tensors(params)
        square = 0.0
        for tensor, mean in self._all(named, self._submit_mean):
            square += self._adapter.squared_distance(tensor, mean)
        return math.sqrt(float(self.allreduce(self._adapter.scalar(square))[0]))

    @contextlib.contextmanager
    def consensus(self, model: Any) -> Iterator[None]:
        """Inside, the model is the mean over all ranks; afterwards it is this rank's own again.

        >>> with bf.consensus(model):  # doctest: +SKIP
        ...     accuracy = evaluate(model)

        Collective at the entry. Parameters and floating-point buffers (BatchNorm's running
        statistics) are averaged. Changes made inside are lost.

        Parameters
        ----------
        model : model, dict, list of tensors, or list of (name, tensor)
        """
        named = self._adapter.averaged(model)
        self._check_in_place(Op.allreduce, named)
        means = self._means(named)
        own = [self._adapter.copy(tensor) for tensor, _ in means]
        try:
            for tensor, mean in means:
                self._adapter.assign(tensor, mean)
            del means
            yield
        finally:
            for (_, tensor), value in zip(named, own):
                self._adapter.assign(tensor, value)

    def empty(self, shape: int | Sequence[int], dtype: Any = None) -> T:
        """An uninitialised tensor that neighbours on this host read in place, without a copy.

        Its memory stays valid as long as the tensor, also after ``shutdown()``.

        Parameters
        ----------
        shape : int or sequence of int
        dtype : optional
            Of this framework; default: the framework's.

        Returns
        -------
        tensor

        Raises
        ------
        ValueError
            A negative dimension, or a dtype that cannot be exchanged.
        BluefogError
            Before ``init()``; no memory (``code`` "RESOURCE_EXHAUSTED").
        """
        try:
            try:
                sizes = [
                    operator.index(s) for s in ([shape] if hasattr(shape, "__index__") else shape)
                ]
            except TypeError:
                raise TypeError(f"shape {shape!r} is not a sequence of int") from None
            if any(s < 0 for s in sizes):
                raise BluefogValueError(f"shape {tuple(sizes)} has a negative dimension")
            if math.prod(max(s, 1) for s in sizes) >= 2**59:
                raise BluefogValueError(f"shape {tuple(sizes)} has too many elements")
            return self._adapter.empty(sizes, dtype)
        except (TypeError, ValueError) as error:
            raise _runtime.located(error, "empty") from None

    # ---- Inside.

    def _neighbor(
        self,
        tensor: T,
        name: str | None,
        self_weight: float | None,
        src_weights: Weights | None,
        dst_weights: Destinations | None,
        message_dtype: Any,
    ) -> _runtime.Pending:
        try:
            arguments = call_weights(self_weight, src_weights, dst_weights)
            if message_dtype is not None:
                arguments["message_dtype"] = dtype_of_messages(message_dtype)
        except (TypeError, ValueError) as error:
            raise _runtime.located(error, "neighbor_allreduce", name) from None
        return self._submit(Op.neighbor_allreduce, tensor, name, **arguments)

    def _hierarchical(
        self,
        tensor: T,
        name: str | None,
        self_weight: float | None,
        src_weights: Weights | None,
        dst_weights: Destinations | None,
    ) -> _runtime.Pending:
        op = Op.hierarchical_neighbor_allreduce
        try:
            if _runtime.local_size() == 1:
                raise AssertionError(
                    "a machine with one rank has no hierarchy; use neighbor_allreduce"
                )
            weights = call_weights(self_weight, src_weights, dst_weights, machines=True)
        except (TypeError, ValueError, AssertionError) as error:
            raise _runtime.located(error, op.name, name) from None
        return self._submit(op, tensor, name, **weights)

    def _allreduce(
        self, tensor: T, name: str | None, average: bool, local: bool, in_place: bool
    ) -> _runtime.Pending:
        return self._submit(
            Op.allreduce, tensor, name, in_place=in_place, average=average, local=bool(local)
        )

    def _submit(
        self, op: Op, tensor: T, name: str | None, in_place: bool = False, **arguments: Any
    ) -> _runtime.Pending:
        adapter = self._adapter
        try:
            if not (name is None or isinstance(name, str)):
                raise TypeError(f"name must be a str, not {type(name).__name__}")
            if name and not name.isascii():
                name.encode()  # Raises where it cannot be.
            if "root" in arguments:
                arguments["root"] = rank_of(arguments["root"], "root rank")
            elif not isinstance(arguments.get("average", True), (bool, np.bool_)):
                raise TypeError(f"average must be a bool, not {arguments['average']!r}")
            submit = _runtime.communicator().submit
            # None and "" both mean the order of calls. Keywords would cost a microsecond here.
            data, owner = adapter.export(tensor, "the tensor", in_place)
            work = submit(op, name or "", data, owner, in_place, **arguments)
            if work is None:  # It has gaps.
                data, owner = adapter.export(adapter.contiguous(tensor), "the tensor", in_place)
                work = submit(op, name or "", data, owner, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise _runtime.located(error, op.name + "_" * in_place, name) from None
        if not in_place:
            if getattr(tensor, "ndim", 0) <= 8:
                return work, adapter.result
            # The engine merges the last of more dimensions.
            shape = (-1, *tensor.shape[1:]) if op == Op.allgather else tuple(tensor.shape)
            return work, lambda w: adapter.result(w).reshape(shape)

        def finish(_: _core.Work) -> T:
            adapter.modified(tensor)
            return tensor

        return work, finish

    def _check_in_place(self, op: Op, named: Iterable[tuple[str, T]]) -> None:
        """Raises what a rank can know by itself, before anything is changed."""
        communicator = _runtime.communicator()
        for name, tensor in named:
            with naming(name):
                try:
                    data, owner = self._adapter.export(tensor, "the tensor", True)
                    communicator.check_in_place(op, data, owner)
                except (TypeError, ValueError, AssertionError) as error:
                    raise _runtime.located(error, op.name + "_") from None

    def _submit_mean(self, tensor: T) -> _runtime.Pending:
        return self._submit(Op.allreduce, tensor, None, average=True)

    def _means(self, named: Iterable[tuple[str, T]]) -> list[tuple[T, T]]:
        """All (tensor, mean over the ranks); they must be assigned by the caller."""
        return list(self._all(named, self._submit_mean))

    def _all(
        self, named: Iterable[tuple[str, T]], submit: Callable[[T], _runtime.Pending]
    ) -> Iterator[tuple[T, T]]:
        """Submits all, then gives (tensor, result) of each; raises when all are through."""
        _runtime.communicator()  # Without any tensor, too, it takes init().
        pending: collections.deque[tuple[str, T, _runtime.Pending]] = collections.deque()
        failure = None
        try:
            for name, tensor in named:
                with naming(name):
                    pending.append((name, tensor, submit(tensor)))
        except Exception:
            # The caller may do with its tensors what it likes as soon as this raises.
            for _, _, operation in pending:
                with contextlib.suppress(BluefogError):
                    _runtime.complete(operation)
            raise
        while pending:
            name, tensor, operation = pending.popleft()
            try:
                with naming(name):
                    result = _runtime.complete(operation)
            except BluefogError as error:
                failure = failure or error
            else:
                yield tensor, result
        if failure is not None:
            raise failure
