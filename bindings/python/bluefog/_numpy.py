"""NumPy arrays for the operations of :mod:`bluefog`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core, _runtime
from ._api import Api
from ._arguments import named_tensors


class NumpyAdapter:
    """Results are new, writable arrays whatever came in; in place works on arrays only."""

    def export(self, tensor: Any, what: str, in_place: bool) -> tuple[Any, None]:
        if in_place and not isinstance(tensor, np.ndarray):
            raise TypeError(
                f"{what}: in place works on NumPy arrays only, not on {type(tensor).__name__}"
            )
        if tensor is None:  # The engine would take it for a barrier.
            raise TypeError(f"{what} is None; expected a NumPy array or an object with __dlpack__")
        return (np.asarray(tensor) if isinstance(tensor, np.generic) else tensor), None

    def contiguous(self, tensor: Any) -> np.ndarray:
        array = tensor if isinstance(tensor, np.ndarray) else np.from_dlpack(tensor)
        return array.copy(order="C")

    def result(self, work: _core.Work) -> np.ndarray:
        return work.to_numpy()

    def modified(self, tensor: np.ndarray) -> None:
        pass

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        name = np.dtype(np.float64 if dtype is None else dtype).name
        return _runtime.communicator().empty_numpy(shape, name)

    def named(self, params: Any) -> list[tuple[str, np.ndarray]] | None:
        return None

    def averaged(self, model: Any) -> list[tuple[str, np.ndarray]]:
        return named_tensors(model)

    def copy(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.copy()

    def assign(self, tensor: np.ndarray, value: np.ndarray) -> None:
        tensor[...] = value

    def squared_distance(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sum(np.square(np.subtract(a, b, dtype=np.float64))))

    def scalar(self, value: float) -> np.ndarray:
        return np.array([value])


api: Api[np.ndarray] = Api(NumpyAdapter())
