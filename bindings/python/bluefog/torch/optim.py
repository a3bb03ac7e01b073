"""Decentralized optimizers: true ``torch.optim.Optimizer`` objects that average while they step.

Every rank trains its own model on its own data. In each step a bucket of parameters leaves for the
neighbours as soon as its gradients exist, during back-propagation; ``step()`` waits for what is
still under way. The arithmetic runs in C++ without the GIL.

Symbols: x parameters, g gradient (weight decay added), W the weights of the graph, lr the learning
rate, beta the momentum.
"""

from __future__ import annotations

from typing import Any

from .. import _runtime
from .._errors import BluefogValueError
from ._optimizer import DistributedOptimizer, told_to_others

__all__ = ["DSGD", "DecentLaM", "DistributedOptimizer", "DmSGD", "PmSGD"]


class DSGD(DistributedOptimizer):
    """Decentralized SGD, adapt-then-combine: x+ = W(x - lr g).

    Needs a doubly stochastic graph, static or not. One message of the model's size per neighbour
    and step. Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized
    Algorithms?" (2017); Chen and Sayed, "Diffusion adaptation strategies" (2012).

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
        topology: Any = None,
        overlap: bool = True,
        broadcast: bool = True,
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
            topology=topology,
            overlap=overlap,
            broadcast=broadcast,
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
        topology: Any = None,
        overlap: bool = True,
        broadcast: bool = True,
        allow_unstable: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            plugin=self._plugin_name,
            topology=topology,
            overlap=overlap,
            broadcast=broadcast,
            allow_unstable=allow_unstable,
            name=name,
        )


class PmSGD(_MomentumOptimizer):
    """Parallel momentum SGD: m+ = beta m + mean(g); x+ = x - lr m+.

    Averages the gradients of all ranks with an all-reduce; the graph is not used. All ranks hold
    the same model, to the bit. The yardstick of the decentralized methods; the name is that of
    Yuan et al. (2021), see :class:`DecentLaM`. On one rank it is ``torch.optim.SGD``.

    Parameters are those of :class:`DistributedOptimizer`.
    """

    _plugin_name = "pmsgd"


class DmSGD(_MomentumOptimizer):
    """Decentralized momentum SGD: m+ = beta m + g; x+ = W(x - lr m+).

    Needs a doubly stochastic graph, static or not. Momentum multiplies the bias that heterogeneous
    data cause by up to 1/(1-beta)**2. Source: Algorithm 1 of Yuan et al., "DecentLaM:
    Decentralized Momentum SGD for Large-Batch Deep Training" (ICCV 2021).

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

    Parameters are those of :class:`DistributedOptimizer`.
    """

    _plugin_name = "decentlam"
