"""Decentralized optimizers: true ``torch.optim.Optimizer`` objects that average while they step.

Every rank trains its own model on its own data. In each step a bucket of parameters leaves for the
neighbours as soon as its gradients exist, during back-propagation; ``step()`` waits for what is
still under way. The arithmetic runs in C++ without the GIL.

Symbols: x parameters, g gradient (weight decay added), W the weights of the graph, lr the learning
rate, beta the momentum.
"""

from __future__ import annotations

from typing import Any, Literal

from .. import _runtime
from .._errors import BluefogValueError
from ._optimizer import DistributedOptimizer, told_to_others

__all__ = ["DSGD", "DecentLaM", "DistributedOptimizer", "DmSGD", "PmSGD"]


class DSGD(DistributedOptimizer):
    """Decentralized SGD, adapt-then-combine: x+ = W(x - lr g).

    Needs a doubly stochastic graph, static or not. One message of the model's size per neighbour
    and step. Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized
    Algorithms?" (2017); Chen and Sayed, "Diffusion adaptation strategies" (2012).

    With ``overlap="delayed"``: x+ = W x - lr g (adapt while combine, the form of Lian et al.'s
    Algorithm 1). The mean of the models moves as before; the bias that heterogeneous data cause is
    somewhat larger (1.6 to 1.7 times on least squares over a ring of 8), and steps must be smaller:
    lr h < 1 + lambda_min instead of 2, with h the largest curvature and lambda_min the least
    eigenvalue of W (-1/3 on that ring).

    Parameters are those of :class:`DistributedOptimizer`; ``momentum`` is there so that the methods
    can be exchanged for each other, and must be 0 (ValueError).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        communication: str = "neighbor_allreduce",
        topology: Any = None,
        overlap: bool | Literal["delayed"] = True,
        broadcast: bool = True,
        message_dtype: Any = None,
        allow_unstable: bool = False,
        name: str | None = None,
    ) -> None:
        with told_to_others(_runtime.communicator()):
            if momentum != 0.0:
                raise BluefogValueError(
                    f"{name or 'dsgd'}: momentum is {momentum!r}, but this method has none: give "
                    "0, or use DmSGD"
                )
        super().__init__(
            params,
            lr,
            None,
            weight_decay,
            plugin="dsgd",
            communication=communication,
            topology=topology,
            overlap=overlap,
            broadcast=broadcast,
            message_dtype=message_dtype,
            allow_unstable=allow_unstable,
            name=name,
        )


class _MomentumOptimizer(DistributedOptimizer):
    _plugin_name = ""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        communication: str = "neighbor_allreduce",
        topology: Any = None,
        overlap: bool | Literal["delayed"] = True,
        broadcast: bool = True,
        message_dtype: Any = None,
        allow_unstable: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            plugin=self._plugin_name,
            communication=communication,
            topology=topology,
            overlap=overlap,
            broadcast=broadcast,
            message_dtype=message_dtype,
            allow_unstable=allow_unstable,
            name=name,
        )


class PmSGD(_MomentumOptimizer):
    """Parallel momentum SGD: m+ = beta m + mean(g); x+ = x - lr m+.

    Averages the gradients of all ranks with an all-reduce; the graph is not used. All ranks hold
    the same model, to the bit. The yardstick of the decentralized methods; the name is that of
    Yuan et al. (2021), see :class:`DecentLaM`. On one rank it is ``torch.optim.SGD``.

    There is no ``overlap="delayed"`` (ValueError): gradients would be one step old, and momentum
    SGD then needs lr h < 1 - beta instead of 2 (1 + beta), 1/38 of it at beta = .9, h being the
    largest curvature. Nor ``message_dtype``: an all-reduce would round its sums again and again.

    Parameters are those of :class:`DistributedOptimizer`.
    """

    _plugin_name = "pmsgd"


class DmSGD(_MomentumOptimizer):
    """Decentralized momentum SGD: m+ = beta m + g; x+ = W(x - lr m+).

    Needs a doubly stochastic graph, static or not. Momentum multiplies the bias that heterogeneous
    data cause by up to 1/(1-beta)**2. Source: Algorithm 1 of Yuan et al., "DecentLaM:
    Decentralized Momentum SGD for Large-Batch Deep Training" (ICCV 2021).

    With ``overlap="delayed"``: m+ = beta m + g; x+ = W x - lr m+ (CDMSGD; AWC-DmSGD of Balu et al.,
    2020). The mean of the models moves as before; the limit is that of delayed DSGD with lr / (1 -
    beta). Steps must stay below lr h < (1 + beta)(1 + lambda_min), h the largest curvature.

    Parameters are those of :class:`DistributedOptimizer`.
    """

    _plugin_name = "dmsgd"


class DecentLaM(_MomentumOptimizer):
    """DecentLaM: v+ = beta v + (x - W(x - lr g)); x+ = x - v+.

    Momentum without the bias it adds to DmSGD: the limit is that of DSGD for every beta. Needs a
    symmetric, static, doubly stochastic graph; a directed or changing one is refused (ValueError
    with the reason; ``allow_unstable=True`` overrides). Source: Algorithm 2 and equations 8 and 10
    of Yuan et al., "DecentLaM: Decentralized Momentum SGD for Large-Batch Deep Training" (ICCV
    2021), in the velocity form: nothing is divided by lr, so lr = 0 is fine.

    With ``overlap="delayed"``: v+ = beta v + (x - (W x - lr g)); x+ = x - v+. Still no bias by
    momentum: the limit is that of delayed :class:`DSGD` for every beta (1.6 to 1.7 times DSGD's
    squared bias on least squares over a ring of 8, beta = .9). Stable for lr h < 2 (1 + beta) - (1
    - lambda_min), h the largest curvature; the needs of the graph are the same. An average that is
    merely added one step late, v+ = beta v + lr g + (I - W) y of the step before, would diverge
    where an eigenvalue of W is below beta.

    Parameters are those of :class:`DistributedOptimizer`.
    """

    _plugin_name = "decentlam"
