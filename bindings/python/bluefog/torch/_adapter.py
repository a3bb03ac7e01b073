"""PyTorch tensors for the operations of :mod:`bluefog.torch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack, to_dlpack

from .. import _core, _runtime
from .._api import Api
from .._arguments import named_tensors
from .._errors import BluefogValueError

_DTYPES = frozenset(
    (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
)
# DLPack's C exchange API, of PyTorch 2.10 and later: without it every call costs two capsules.
_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def export(tensor: Any, what: str) -> Any:
    """A DLPack capsule of a dense CPU tensor, whether it requires gradients or not."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.dtype not in _DTYPES:
        names = ", ".join(sorted(str(d).rpartition(".")[2] for d in _DTYPES))
        raise TypeError(f"{what} has dtype {tensor.dtype}; what can be exchanged is {names}")
    if tensor.is_nested:
        raise BluefogValueError(f"{what} is nested: use tensor.to_padded_tensor(0.0) first")
    if tensor.layout is not torch.strided:
        raise BluefogValueError(f"{what} is {tensor.layout}: use tensor.to_dense() first")
    if tensor.device.type != "cpu":
        raise BluefogValueError(
            f"{what} lies on {tensor.device}: only tensors in host memory can be exchanged; "
            "move it there first (tensor.cpu())"
        )
    return to_dlpack(tensor.detach().resolve_neg())


class TorchAdapter:
    """Results are new tensors without history."""

    def export(self, tensor: Any, what: str, in_place: bool) -> tuple[Any, Any]:
        if (
            _EXCHANGE
            and type(tensor) in _PLAIN
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.dtype in _DTYPES
            and not tensor.is_nested
            and not tensor.is_neg()
        ):
            return tensor, tensor.untyped_storage()
        if in_place and isinstance(tensor, torch.Tensor) and tensor.is_neg():
            raise BluefogValueError(
                f"{what} has the negative bit (torch.imag of a conjugate), so its memory holds "
                "other values: in place use tensor.resolve_neg(), or the call that returns its "
                "result"
            )
        return export(tensor, what), None

    def contiguous(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous()

    def result(self, work: _core.Work) -> torch.Tensor:
        return work.to_tensor(torch.Tensor) if _EXCHANGE else from_dlpack(work.to_dlpack())

    def modified(self, tensor: torch.Tensor) -> None:
        if not tensor.is_inference():
            increment_version(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
        if not isinstance(dtype or torch.float32, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {dtype!r}")
        name = str(dtype or torch.get_default_dtype()).rpartition(".")[2]
        return from_dlpack(_runtime.communicator().empty_dlpack(shape, name))

    def named(self, params: Any) -> list[tuple[str, torch.Tensor]] | None:
        return list(params.named_parameters()) if isinstance(params, torch.nn.Module) else None

    def averaged(self, model: Any) -> list[tuple[str, torch.Tensor]]:
        if not isinstance(model, torch.nn.Module):
            return named_tensors(model)
        buffers = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
        return [*model.named_parameters(), *buffers]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def assign(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(value)

    def squared_distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.detach().double() - b.double()).square().sum())

    def scalar(self, value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)


api: Api[torch.Tensor] = Api(TorchAdapter())
