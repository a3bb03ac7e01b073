"""What callers pass, checked: names of parameters, ranks, weights; and errors that say where."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Union

import numpy as np

from . import _runtime
from ._errors import BluefogError, BluefogValueError, as_int

Weights = Mapping[int, float]
Destinations = Union[Mapping[int, float], Sequence[int]]
_MESSAGE_DTYPES = ("bfloat16", "float16", "float32", "float64")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the parameter's name to errors of an operation that has none of its own."""
    try:
        yield
    except BluefogError as error:
        raise type(error)(f"parameter '{name}': {error}", error.code) from error
    except (TypeError, AssertionError) as error:
        raise type(error)(f"parameter '{name}': {error}") from error


def named_tensors(params: Any) -> list[tuple[str, Any]]:
    if isinstance(params, Mapping):
        if not all(isinstance(name, str) for name in params):
            raise BluefogValueError(
                f"rank {_runtime.rank()}: parameters in a dict must have names: keys must be str"
            )
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
        f"rank {_runtime.rank()}: parameters must be a dict, a list of tensors or a list of (name, "
        f"tensor), not {type(params).__name__}"
    )


def dtype_of_messages(value: Any) -> str | None:
    """The name of a dtype of any framework; None stays None."""
    if value is None:
        return None
    name = value if isinstance(value, str) else str(value).rpartition("torch.")[2]
    if name not in _MESSAGE_DTYPES:
        with contextlib.suppress(TypeError):
            name = np.dtype(value).name
    if name not in _MESSAGE_DTYPES:
        raise BluefogValueError(
            f"message_dtype is {value!r}; it is one of {', '.join(_MESSAGE_DTYPES)}, or None"
        )
    return name


def rank_of(value: Any, what: str, size: int | None = None) -> int:
    """A rank, or with ``size`` a machine of so many."""
    rank = as_int(value, what)
    if size is None:
        size = _runtime.size()
    if not 0 <= rank < size:
        raise BluefogValueError(f"{what} {rank} is outside 0..{size - 1}")
    return rank


def _weight_of(value: Any, what: str) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, not {value!r}")
    return float(value)


def _edges(
    weights: Mapping[Any, Any], argument: str, node: str, size: int
) -> list[tuple[int, float]]:
    return [
        (rank_of(r, f"{argument}: {node}", size), _weight_of(w, f"{argument}[{r!r}]"))
        for r, w in weights.items()
    ]


def call_weights(
    self_weight: float | None,
    src_weights: Weights | None,
    dst_weights: Destinations | None,
    machines: bool = False,
) -> dict[str, Any]:
    """Checked; of machines all three come together."""
    src, dst = "src_weights", "dst_weights"
    node, size = "rank", _runtime.size()
    if machines:
        src, dst = "src_machine_weights", "dst_machine_weights"
        node, size = "machine", _runtime.machine_size()
        given = [w is not None for w in (self_weight, src_weights, dst_weights)]
        if any(given) and not all(given):
            raise BluefogValueError(f"give self_weight, {src} and {dst} together, or none of them")
    if (self_weight is None) != (src_weights is None):
        missing, there = ("self_weight", "src_weights")
        if self_weight is not None:
            missing, there = there, missing
        raise BluefogValueError(f"{there} is given without {missing}; give both, or none")
    if self_weight is None:
        if dst_weights is not None:
            raise BluefogValueError(
                "dst_weights makes the call dynamic, which needs self_weight and src_weights too"
            )
        return {}
    if not isinstance(src_weights, Mapping):
        raise TypeError(f"{src} must be a dict, not {type(src_weights).__name__}")
    destinations: list[tuple[int, float]] | None = None
    if isinstance(dst_weights, Mapping):
        destinations = _edges(dst_weights, dst, node, size)
    elif dst_weights is not None:
        if isinstance(dst_weights, (str, bytes)) or not isinstance(dst_weights, Iterable):
            raise TypeError(f"{dst} must be a dict or a list of {node}s, not {dst_weights!r}")
        destinations = [(rank_of(r, f"{dst}: {node}", size), 1.0) for r in dst_weights]
    return {
        "self_weight": _weight_of(self_weight, "self_weight"),
        "src": _edges(src_weights, src, node, size),
        "dst": destinations,
    }
