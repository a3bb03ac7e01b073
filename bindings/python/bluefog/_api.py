"""The operations, once for all kinds of tensors.

``Api`` holds the whole logic; what a framework's tensors need is in a small ``Adapter``.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, Generic, Protocol, TypeVar, Union

import numpy as np

from . import _core, _runtime
from ._core import Op
from ._errors import BluefogError, BluefogValueError

T = TypeVar("T")
Weights = Mapping[int, float]
Destinations = Union[Mapping[int, float], Sequence[int]]


class Adapter(Protocol[T]):
    """What the operations need to know about one framework's tensors."""

    def export(self, tensor: Any, what: str, in_place: bool) -> Any:
        """Something that ``_core`` imports; errors call the tensor ``what``."""

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

    def averaged(self, model: Any) -> list[T]:
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
    ) -> int:
        """Start :func:`neighbor_allreduce`; parameters and errors are the same.

        The tensor must not be changed before the handle is synchronized. So with all nonblocking
        operations.

        Returns
        -------
        int
            A handle for ``synchronize``, ``wait`` and ``poll``.
        """
        try:
            weights = _call_weights(self_weight, src_weights, dst_weights)
        except (TypeError, ValueError) as error:
            raise _located(error, Op.neighbor_allreduce, name) from None
        return self._submit(Op.neighbor_allreduce, tensor, name, **weights)

    def neighbor_allreduce(
        self,
        tensor: T,
        *,
        self_weight: float | None = None,
        src_weights: Weights | None = None,
        dst_weights: Destinations | None = None,
        enable_topo_check: bool = True,
        name: str | None = None,
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

        Returns
        -------
        tensor
            A new tensor of the same shape and dtype.

        Raises
        ------
        ValueError
            Weights that are incomplete, name this rank, a rank twice or none that exists; a
            neighbour that called with another shape, dtype or set of ranks.
        BluefogError
            A neighbour died or never called; ``code`` says which.
        """
        return _runtime.synchronize(
            self.neighbor_allreduce_nonblocking(
                tensor,
                self_weight=self_weight,
                src_weights=src_weights,
                dst_weights=dst_weights,
                enable_topo_check=enable_topo_check,
                name=name,
            )
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
        _refuse_hierarchical(is_hierarchical_local)
        return self._submit(Op.allreduce, tensor, name, average=average)

    def allreduce(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> T:
        """Mean (or sum, with ``average=False``) over all ranks, the same bits on every rank.

        Parameters
        ----------
        tensor : tensor of any shape, floating point; int32 and int64 with ``average=False``
            Same shape, dtype and memory order on all ranks. It is not changed.
        average : bool
            Mean or sum.
        is_hierarchical_local : bool
            True is not available yet (ValueError).
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
        handle = self.allreduce_nonblocking(tensor, average, is_hierarchical_local, name)
        return _runtime.synchronize(handle)

    def allreduce_nonblocking_(
        self,
        tensor: T,
        average: bool = True,
        is_hierarchical_local: bool = False,
        name: str | None = None,
    ) -> int:
        """Start :func:`allreduce_` (the same parameters); returns a handle for ``synchronize``."""
        _refuse_hierarchical(is_hierarchical_local)
        return self._submit(Op.allreduce, tensor, name, in_place=True, average=average)

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
        handle = self.allreduce_nonblocking_(tensor, average, is_hierarchical_local, name)
        return _runtime.synchronize(handle)

    def broadcast_nonblocking(self, tensor: T, root_rank: int, name: str | None = None) -> int:
        """Start :func:`broadcast` (the same parameters); returns a handle for ``synchronize``."""
        return self._submit(Op.broadcast, tensor, name, root=root_rank)

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
        return _runtime.synchronize(self.broadcast_nonblocking(tensor, root_rank, name))

    def broadcast_nonblocking_(self, tensor: T, root_rank: int, name: str | None = None) -> int:
        """Start :func:`broadcast_` (the same parameters); returns a handle for ``synchronize``."""
        return self._submit(Op.broadcast, tensor, name, in_place=True, root=root_rank)

    def broadcast_(self, tensor: T, root_rank: int, name: str | None = None) -> T:
        """:func:`broadcast` in place: overwrites ``tensor`` and returns it.

        Raises
        ------
        ValueError
            As :func:`broadcast`; also a tensor that is read-only or has gaps in memory.
        """
        return _runtime.synchronize(self.broadcast_nonblocking_(tensor, root_rank, name))

    def allgather_nonblocking(self, tensor: T, name: str | None = None) -> int:
        """Start :func:`allgather` (the same parameters); returns a handle for ``synchronize``."""
        return self._submit(Op.allgather, tensor, name)

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
        return _runtime.synchronize(self.allgather_nonblocking(tensor, name))

    # ---- Models.

    def broadcast_parameters(self, params: Any, root_rank: int) -> None:
        """Overwrite all tensors with those of ``root_rank``.

        Parameters
        ----------
        params : dict (taken in the order of its keys), list of tensors, or list of (name, tensor)
            ``model.state_dict()``, for example. Leaves that require gradients are fine. All must be
            writable and without gaps in memory.
        root_rank : int
            The same on all ranks.

        Raises
        ------
        ValueError
            Something else than the above; a tensor that differs in shape or dtype (named).
        """
        self._in_place(Op.broadcast, _named_tensors(params), root=root_rank)

    def allreduce_parameters(self, params: Any) -> None:
        """Overwrite all tensors with their mean over the ranks.

        Parameters and errors are those of :func:`broadcast_parameters`; floating point only.
        """
        self._in_place(Op.allreduce, _named_tensors(params), average=True)

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
            named = _named_tensors(params)
        submit = functools.partial(self._submit, Op.allreduce, name=None, average=True)
        square = 0.0
        for tensor, mean in self._all(named, submit):
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
        tensors = self._adapter.averaged(model)
        own = [self._adapter.copy(tensor) for tensor in tensors]
        self._in_place(Op.allreduce, _named_tensors(tensors), average=True)
        try:
            yield
        finally:
            for tensor, value in zip(tensors, own):
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
            sizes = [operator.index(s) for s in ([shape] if hasattr(shape, "__index__") else shape)]
        except TypeError:
            raise TypeError(f"empty: shape {shape!r} is not a sequence of int") from None
        if any(s < 0 for s in sizes):
            raise BluefogValueError(f"empty: shape {tuple(sizes)} has a negative dimension")
        if math.prod(max(s, 1) for s in sizes) >= 2**59:
            raise BluefogValueError(f"empty: shape {tuple(sizes)} has too many elements")
        return self._adapter.empty(sizes, dtype)

    # ---- Inside.

    def _submit(
        self, op: Op, tensor: T, name: str | None, in_place: bool = False, **arguments: Any
    ) -> int:
        adapter = self._adapter
        try:
            if not (name is None or isinstance(name, str)):
                raise TypeError(f"name must be a str, not {type(name).__name__}")
            if name and not name.isascii():
                name.encode()  # Raises where it cannot be.
            if "root" in arguments:
                arguments["root"] = _rank_of(arguments["root"], "root rank")
            elif not isinstance(arguments.get("average", True), (bool, np.bool_)):
                raise TypeError(f"average must be a bool, not {arguments['average']!r}")
            # A caller's None and "" both mean the order of calls.
            arguments["name"] = name or ""
            exported = adapter.export(tensor, "the tensor", in_place)
            work = _runtime.submit(op, input=exported, in_place=in_place, **arguments)
            if work is None:
                exported = adapter.export(adapter.contiguous(tensor), "the tensor", in_place)
                work = _runtime.submit(op, input=exported, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise _located(error, op, name, in_place) from None
        if not in_place:
            if getattr(tensor, "ndim", 0) <= 8:
                return _runtime.add_handle(work, adapter.result)
            # The engine merges the last of more dimensions.
            shape = (-1, *tensor.shape[1:]) if op == Op.allgather else tuple(tensor.shape)
            return _runtime.add_handle(work, lambda w: adapter.result(w).reshape(shape))

        def finish(_: _core.Work) -> T:
            adapter.modified(tensor)
            return tensor

        return _runtime.add_handle(work, finish)

    def _in_place(self, op: Op, named: Iterable[tuple[str, T]], **arguments: Any) -> None:
        submit = functools.partial(self._submit, op, name=None, in_place=True, **arguments)
        for _ in self._all(named, submit):
            pass

    def _all(
        self, named: Iterable[tuple[str, T]], submit: Callable[[T], int]
    ) -> Iterator[tuple[T, T]]:
        """Submits all, then gives (tensor, result) of each; raises when all are through."""
        _runtime.communicator()  # Without any tensor, too, it takes init().
        pending: collections.deque[tuple[str, T, int]] = collections.deque()
        failure = None
        try:
            for name, tensor in named:
                with _naming(name):
                    pending.append((name, tensor, submit(tensor)))
            while pending:
                name, tensor, handle = pending[0]
                try:
                    with _naming(name):
                        result = _runtime.synchronize(handle)
                except BluefogError as error:
                    failure = failure or error
                else:
                    yield tensor, result
                pending.popleft()
        finally:
            for *_, handle in pending:
                _runtime.forget(handle)
        if failure is not None:
            raise failure


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the parameter's name to errors of an operation that has none of its own."""
    try:
        yield
    except BluefogError as error:
        raise type(error)(f"parameter '{name}': {error}", error.code) from error
    except (TypeError, AssertionError) as error:
        raise type(error)(f"parameter '{name}': {error}") from error


def _named_tensors(params: Any) -> list[tuple[str, Any]]:
    if isinstance(params, Mapping):
        if not all(isinstance(name, str) for name in params):
            raise BluefogValueError("parameters in a dict must have names: its keys must be str")
        return sorted(params.items())
    if (
        isinstance(params, Iterable)
        and not isinstance(params, str)
        and not hasattr(params, "shape")
    ):
        items = list(params)
        if all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in items):
            return items
        if not any(isinstance(p, (tuple, str)) for p in items):
            return [(str(i), p) for i, p in enumerate(items)]
    raise BluefogValueError(
        "parameters must be a dict, a list of tensors or a list of (name, tensor), not "
        + type(params).__name__
    )


def _refuse_hierarchical(is_hierarchical_local: bool) -> None:
    if is_hierarchical_local:
        raise BluefogValueError("is_hierarchical_local=True is not available yet; use allreduce")


def _located(error: Exception, op: Op, name: Any, in_place: bool = False) -> Exception:
    """The error with rank, operation and tensor at the head, as the engine writes them."""
    text = str(error)
    kind = type(error)
    if getattr(error, "code", "") == "FAILED_PRECONDITION" or text.startswith("rank "):
        return error
    head = f"rank {_runtime.rank()}: "
    if not text.startswith("tensor "):
        head += op.name + ("_" if in_place else "") + (f" {name!r}" if name else "") + ": "
    if kind not in (TypeError, AssertionError, BluefogValueError):
        kind = BluefogValueError  # UnicodeError has other arguments.
    return kind(head + text).with_traceback(error.__traceback__)


def _rank_of(value: Any, what: str) -> int:
    try:
        rank = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, not {value!r}") from None
    if not 0 <= rank < _runtime.size():
        raise BluefogValueError(f"{what} {rank} is outside 0..{_runtime.size() - 1}")
    return rank


def _weight_of(value: Any, what: str) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, not {value!r}")
    return float(value)


def _edges(weights: Mapping[Any, Any], argument: str) -> list[tuple[int, float]]:
    return [
        (_rank_of(r, f"{argument}: rank"), _weight_of(w, f"{argument}[{r!r}]"))
        for r, w in weights.items()
    ]


def _call_weights(
    self_weight: float | None, src_weights: Weights | None, dst_weights: Destinations | None
) -> dict[str, Any]:
    if (self_weight is None) != (src_weights is None):
        missing, given = ("self_weight", "src_weights")
        if self_weight is not None:
            missing, given = given, missing
        raise BluefogValueError(f"{given} is given without {missing}; give both, or none")
    if self_weight is None:
        if dst_weights is not None:
            raise BluefogValueError(
                "dst_weights makes the call dynamic, which needs self_weight and src_weights too"
            )
        return {}
    if not isinstance(src_weights, Mapping):
        raise TypeError(f"src_weights must be a dict, not {type(src_weights).__name__}")
    destinations: list[tuple[int, float]] | None = None
    if isinstance(dst_weights, Mapping):
        destinations = _edges(dst_weights, "dst_weights")
    elif dst_weights is not None:
        if isinstance(dst_weights, (str, bytes)) or not isinstance(dst_weights, Iterable):
            raise TypeError(f"dst_weights must be a dict or a list of ranks, not {dst_weights!r}")
        destinations = [(_rank_of(r, "dst_weights: rank"), 1.0) for r in dst_weights]
    return {
        "self_weight": _weight_of(self_weight, "self_weight"),
        "src": _edges(src_weights, "src_weights"),
        "dst": destinations,
    }
