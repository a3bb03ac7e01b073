"""The optimizer of :mod:`bluefog.torch.optim`, for any plugin of the engine.

What it adds to ``torch.optim.Optimizer``: registration with the engine, hooks that give it
gradients during back-propagation, and the checks that nothing changed what was given.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any, Callable, Literal

import torch
from torch.autograd.graph import increment_version
from torch.utils.dlpack import to_dlpack

from .. import _core, _runtime
from .. import topology as _topology
from .._arguments import dtype_of_messages
from .._errors import BluefogError, BluefogValueError
from . import _adapter

# What bind and ready of the core found to differ from the registration.
_PARAMETER, _GRADIENT = 1, 2
# What a copy of an optimizer has of its own, beside what torch.optim.Optimizer copies.
_COPIED = (
    *(
        "_allow_unstable",
        "_broadcasts",
        "_communication",
        "_delayed",
        "_limits",
        "_message_dtype",
        "_name",
        "_overlap",
        "_plugin",
        "_state_names",
        "_topologies",
        "_where",
    ),
)
_LOCAL_CURE = "make the optimizer with overlap=False"
_NEIGHBORS, _MACHINES = "neighbor_allreduce", "hierarchical_neighbor_allreduce"


class _Slot:
    """One parameter as it was registered, and what its hook saw in this step."""

    __slots__ = (
        *("address", "alone", "dtype", "grad", "grad_storage", "index", "name", "param"),
        *("shape", "storage", "stride", "versions"),
    )

    def __init__(self, index: int, name: str, param: torch.Tensor) -> None:
        self.index = index
        self.name = name
        self.param = param
        self.dtype = param.dtype
        self.shape = param.shape
        self.stride = param.stride()
        self.grad: torch.Tensor | None = None  # Not None: given to the engine in this step.
        self.versions = (0, 0)  # Of the parameter and its gradient when they were given.
        self.address = -1
        self.storage: Any = None
        self.grad_storage: Any = None
        self.alone = True  # No other parameter shares its storage, and perhaps its version.
        self.hold(None)

    def hold(self, gradient: torch.Tensor | None) -> None:
        """Keep the memory that the engine has now: `param.data = …` takes it from the tensor."""
        address = self.param.data_ptr()
        if address != self.address:
            self.address, self.storage = address, self.param.untyped_storage()
        self.grad_storage = None if gradient is None else gradient.untyped_storage()

    def stand_in(self) -> torch.Tensor:
        """The parameter as the engine had it last, however it has been changed since."""
        x = torch.empty(0, dtype=self.dtype)
        offset = (self.address - self.storage.data_ptr()) // x.element_size()
        return x.set_(self.storage, offset, self.shape, self.stride)

    def fits(self) -> bool:
        p = self.param
        return p.dtype is self.dtype and p.shape == self.shape and p.stride() == self.stride


@contextlib.contextmanager
def told_to_others(communicator: Any, name: str = "") -> Iterator[None]:
    """Where an optimizer is made: what raises on one rank only must not let the others wait."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(BluefogError):  # What is raised here counts.
            _core.optimizer_not_created(communicator, str(error), name)
        raise


def _communication_of(communication: Any, where: str, traits: dict[str, Any]) -> str:
    known = isinstance(communication, str)
    # BlueFog writes hierarchical.neighbor.allreduce.
    name = communication.replace(".", "_") if known else communication
    if not known or name not in (_NEIGHBORS, _MACHINES):
        raise BluefogValueError(
            f"{where}: communication must be {_NEIGHBORS!r} or {_MACHINES!r}, not {communication!r}"
        )
    if name == _MACHINES and not traits["uses_topology"]:
        raise BluefogValueError(
            f"{where}: this method averages over all ranks and uses no graph, so communication="
            f"{name!r} means nothing to it; leave it out (the all-reduce knows of machines itself)"
        )
    return name


class DistributedOptimizer(torch.optim.Optimizer):
    """An optimizer plugin of the engine on PyTorch parameters; base of the named optimizers.

    Collective: every rank makes it with the same parameters in the same order, which is checked
    first (names, shapes, dtypes, memory order; the error names the rank that differs). Then the
    parameters are overwritten with those of rank 0, so that all ranks start from one model.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of groups (dict)
        float32 or float64 in host memory, dense in memory. Names appear in errors. Parameters that
        do not require gradients are not sent; those without a gradient in a step are, with g = 0.
    lr : float
        Learning rate, >= 0; equal on all ranks in the same step.
    momentum : float, optional
        beta, >= 0; None for plugins that have none.
    weight_decay : float
        lambda in g + lambda * x, >= 0.
    plugin : str
        Name of the plugin; ValueError lists those that exist.
    communication : {"neighbor_allreduce", "hierarchical_neighbor_allreduce"}
        What W is. Hierarchical: the ranks of a machine average exactly, and their means are mixed
        over the graph between machines, so that W is that graph's matrix (x) J/L with L ranks on
        each machine; the plugin's demands on W hold for this product. Not for plugins that average
        over all ranks.
    topology : networkx graph, numpy.ndarray, Topology or TopologySequence, optional
        The graph of this optimizer (between machines where the communication is hierarchical); the
        round of a sequence is the step. Default: that of ``bf.set_topology`` or
        ``bf.set_machine_topology``, read at each step.
    overlap : bool or "delayed"
        True: parameters and gradients belong to the engine from the moment a gradient is ready
        until ``step()`` returns. Gradients must not be changed in between (clipping, loss scaling)
        and there is one backward per step; use :meth:`no_sync` to accumulate. False: everything
        happens inside ``step()``, which is right for any code. "delayed": as True, and what a step
        sends is averaged until the gradients of the next one are there, so that communication has a
        whole step to hide under. Neighbours get the model as the step leaves it: ``W(x - lr g)``
        becomes ``W x - lr g`` in the recursion (weight decay acts on W x), see each optimizer; one
        that does not stand it raises, with the reason.
    broadcast : bool
        False: keep each rank's own initial parameters.
    message_dtype : str or dtype, optional
        "bfloat16" or "float16" ("float32" for float64 parameters): what travels to neighbours is
        rounded to it, in the form that keeps the mean of the models, see
        :func:`bluefog.neighbor_allreduce`. Default: the parameters' own.
    allow_unstable : bool
        Run on a graph for which the algorithm is known to diverge (with a warning).
    name : str, optional
        Distinguishes optimizers in errors; default: the plugin's name.
    **hypers : float
        Hyper-parameters of the plugin's own, see ``bluefog info``; per group like lr.

    Raises
    ------
    ValueError
        A parameter that cannot be exchanged (named); a graph that the algorithm does not stand,
        with the reason; parameters that differ between ranks.
    BluefogError
        Use before ``bf.init()``; a rank that died.

    Notes
    -----
    Misuse of this rank's (a changed gradient, a second backward) ends the step that was begun
    before it raises: with the gradients that were there when each became ready, and zero for
    parameters that had none. So neighbours do not wait, all ranks stay at the same step, and the
    optimizer can be used again. Changes that autograd does not see (``p.grad.data``, NumPy views)
    are not noticed, and give results that depend on chance.

    What ranks tell each other (another lr, topology or step; a rank that came too late; a model
    that one of them changed so that it cannot be exchanged) ends the optimizer, as parameters may
    be partly updated: every further step raises. Once it has raised on every rank,
    ``load_state_dict`` on all of them makes it work again, or make a new one.

    With a ``GradScaler`` use ``overlap=False``. An overflow on this rank then means a step with g
    = 0: it still sends, because its neighbours count on it.
    """

    # GradScaler then always calls step(), which does the unscaling: a step is never skipped.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        *,
        plugin: str,
        communication: str = "neighbor_allreduce",
        topology: Any = None,
        overlap: bool | Literal["delayed"] = True,
        broadcast: bool = True,
        message_dtype: Any = None,
        allow_unstable: bool = False,
        name: str | None = None,
        **hypers: float,
    ) -> None:
        communicator = _runtime.communicator()
        with told_to_others(communicator):
            if not isinstance(plugin, str):
                raise TypeError(f"plugin must be a name, not {plugin!r}")
            self._plugin = plugin
            traits = _core.optimizer_traits(plugin)
            self._state_names: list[str] = traits["states"]
            # Hyper-parameters with their lowest and highest value.
            own = {key: limits for key, _, *limits in traits["hypers"]}
            common = dict.fromkeys(("lr", "momentum", "weight_decay"), (0.0, sys.float_info.max))
            self._limits = [(key, *limits) for key, limits in {**common, **own}.items()]
            self._name = name or plugin
            self._where = f"rank {communicator.rank}: {self._name}"
            if isinstance(overlap, str) and overlap != "delayed":
                raise BluefogValueError(
                    f"{self._where}: overlap is {overlap!r}; it is True, False or 'delayed'"
                )
            self._overlap, self._delayed = bool(overlap), overlap == "delayed"
            self._message_dtype = dtype_of_messages(message_dtype)
            self._communication = _communication_of(communication, self._where, traits)
            self._allow_unstable = allow_unstable
            self._broadcasts = bool(broadcast)
            # By the step from which each is used; None: that of bf.set_topology.
            self._topologies: dict[int, Any] = {
                0: None if topology is None else self._sequence(topology)
            }
            self._forget()
            defaults = {"lr": lr, "weight_decay": weight_decay, "step": 0}
            defaults.update({key: initial for key, initial, *_ in traits["hypers"]})
            unknown = sorted(set(hypers) - set(own))
            if unknown:
                raise TypeError(
                    f"{self._where}: {plugin} has no hyper-parameter {', '.join(unknown)}; beside "
                    f"lr, momentum and weight_decay it has {', '.join(own) or 'none'}"
                )
            defaults.update(hypers)
            if momentum is not None:
                defaults["momentum"] = momentum
            super().__init__(params, defaults)
        self._register(communicator)
        if broadcast:
            self._broadcast()

    def _forget(self) -> None:
        """What belongs to this process and its engine; the first step registers anew."""
        self._communicator: Any = None
        self._core: Any = None
        # Registered anew, it needs a name that only ranks with the same history give it.
        self._first_name, self._recoveries, self._attempts = "", 0, 0
        self._unregistered = False  # The last attempt failed.
        self._slots: dict[torch.Tensor, _Slot] = {}
        self._hooks: dict[torch.Tensor, Any] = {}
        self._hypers: list[list[float]] = []
        self._stepping = False  # From the first hook of a step to the end of step().
        self._syncing = True

    # ---- Groups, state, checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_plugin" in state:  # A copy; not load_state_dict.
            self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all ranks alike; it takes part from the next step on, as it is here.

        ``bf.broadcast_parameters`` makes the new parameters equal on all ranks, where they are not.
        """
        self._hyper_of({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params = group["params"]
        if len(set(params)) != len(params):
            twice = next(p for i, p in enumerate(params) if any(p is q for q in params[:i]))
            name = self._name_of(twice)
            self.param_groups.pop()
            raise BluefogValueError(
                f"{self._where}: parameter '{name}' stands twice in a group; give it once"
            )
        group["step"] = self.param_groups[0]["step"]
        for param in params:
            self._make_state(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave: hyper-parameters, state vectors and the step counter.

        Not collective, but with ``overlap="delayed"`` all ranks must do it at the same step: the
        next one sends the models anew. Raises BluefogError between ``backward()`` and ``step()``,
        ValueError where a state vector or hyper-parameter does not fit; nothing is changed then.
        """
        if self._stepping:
            raise BluefogError(
                f"{self._where}: load_state_dict between backward() and step(); call step() first"
            )
        before = self.state, self.param_groups
        super().load_state_dict(state_dict)
        try:
            for group in self.param_groups:
                group.setdefault("step", 0)
                self._hyper_of(group)
                for param in group["params"]:
                    self._make_state(param)
        except BaseException:
            self.state, self.param_groups = before
            raise
        failed = self._core is not None and self._core.failure
        if failed or self._unregistered:  # The next step registers anew.
            self._core, self._unregistered = None, False
            self._recoveries, self._attempts = self._recoveries + 1, 0
        if self._core is not None:
            self._core.step = self.param_groups[0]["step"]

    def set_topology(self, topology: Any, from_step: int | None = None) -> None:
        """Use another graph from step ``from_step`` on (default: the next but one).

        With ``overlap="delayed"`` the default is one step later, as what the next step averages has
        left.

        Every rank calls it with the same arguments before that step.

        Parameters
        ----------
        topology : networkx graph, numpy.ndarray, Topology or TopologySequence
        from_step : int, optional
            Counted from 0; later than the step under way.

        Raises
        ------
        ValueError
            A step that comes too soon, or a graph that the method does not stand.
        """
        sequence = self._sequence(topology)
        if from_step is None:
            from_step = self.param_groups[0]["step"] + (2 if self._delayed else 1)
        if self._core is not None:
            try:
                self._core.set_topology(sequence, from_step)
            except BluefogValueError as error:
                raise _runtime.located(error, self._name) from None
        self._topologies[from_step] = sequence

    def _sequence(self, topology: Any) -> Any:
        machines = self._communication != _NEIGHBORS
        nodes = (_runtime.machine_size(), True, "machines") if machines else (_runtime.size(), True)
        try:
            return _topology.as_sequence(topology, *nodes)
        except (TypeError, ValueError) as error:
            raise _runtime.located(error, self._name) from None

    @property
    def bytes_pinned(self) -> int:
        """Bytes of payload slots that the engine holds for this optimizer."""
        return 0 if self._core is None else self._core.bytes_pinned

    def _make_state(self, param: torch.Tensor, reset: bool = False) -> None:
        """State vectors as long and laid out as the parameter; existing ones are converted.

        Those that cannot be raise, or are zero from now on with ``reset``.
        """
        state = self.state[param]
        for name in self._state_names:
            old = state.get(name)
            shape = getattr(old, "shape", None)
            if shape == param.shape and old.dtype == param.dtype and old.stride() == param.stride():
                continue
            new = torch.zeros_like(param, requires_grad=False)
            if shape == param.shape:
                new.copy_(old)
            elif old is not None and not reset:
                what = f"is a {type(old).__name__}" if shape is None else f"has shape {[*shape]}"
                raise BluefogValueError(
                    f"{self._where}: state '{name}' of parameter '{self._name_of(param)}' {what}, "
                    f"the parameter has shape {[*param.shape]}"
                )
            state[name] = new

    # ---- Registration: again whenever parameters came, went or changed their dtype or layout.

    def _names(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield names[i] if names else f"{g}.{i}", param, g

    def _name_of(self, param: torch.Tensor) -> str:
        return next((name for name, p, _ in self._names() if p is param), "?")

    def _register(self, communicator: Any) -> None:
        first = self._communicator is not communicator
        name = ""
        if not first:
            if self._core is not None and self._core.failure:
                raise BluefogError(
                    f"{self._where}: the optimizer failed before: {self._core.failure}. Load a "
                    "checkpoint on all ranks, or make a new optimizer there"
                )
            name = f"{self._first_name}.{self._recoveries}.{self._attempts}"
            self._attempts += 1
        try:
            self._enter(communicator, name)
        except Exception as error:
            if not first:
                if self._core is not None:  # Others may be in a step that this rank won't come to.
                    self._core.retire(str(error))
                self._core, self._unregistered = None, True
            raise
        self._unregistered = False
        if first:
            self._first_name, self._recoveries, self._attempts = self._core.name, 0, 0

    def _enter(self, communicator: Any, registration: str) -> None:
        entries, slots = [], {}
        with told_to_others(communicator, registration):
            for name, param, group in self._names():
                if not param.requires_grad:
                    continue
                capsule = _adapter.export(param, f"{self._where}: parameter '{name}'")
                slots[param] = _Slot(len(entries), name, param)
                entries.append((name, capsule, group))
                self._make_state(param)
        shares = collections.Counter(p.untyped_storage().data_ptr() for p in slots)
        for param, slot in slots.items():
            slot.alone = shares[param.untyped_storage().data_ptr()] == 1
        if self._core is not None and registration:
            # If this is the only rank, the others must not wait for a step of the old one.
            self._core.retire(self._changes(slots))
        self._core = None  # Its slots are free before the new ones are taken.
        step = self.param_groups[0]["step"]
        current = max(s for s in self._topologies if s <= step)
        try:
            core = _core.DistributedOptimizer(
                communicator,
                self._plugin,
                entries,
                self._topologies[current],
                self._allow_unstable,
                step,
                f"broadcast={self._broadcasts}",
                registration,
                self._message_dtype,
                self._delayed,
                self._communication != _NEIGHBORS,
            )
            self._core = core
            for from_step, sequence in self._topologies.items():
                if from_step > current:
                    core.set_topology(sequence, from_step)
        except BluefogValueError as error:
            if str(error).startswith("rank "):
                raise
            raise BluefogValueError(f"{self._where}: {error}") from None
        self._communicator, self._slots = communicator, slots
        for param in [p for p in self._hooks if p not in slots]:
            self._hooks.pop(param).remove()
        if not self._overlap:
            return
        # A strong reference from the parameter to its optimizer would keep both alive for ever.
        hook = functools.partial(_on_gradient, weakref.ref(self))
        for param in slots:
            if param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def _changes(self, now: dict[torch.Tensor, _Slot]) -> str:
        """Why this rank registers anew: the first parameter that differs from before."""

        def told(slot: _Slot | None) -> str:
            if slot is None:
                return "not there or frozen"
            return f"{slot.dtype}{list(slot.shape)} with strides {slot.stride}"

        for param in {**self._slots, **now}:
            old, new = self._slots.get(param), now.get(param)
            if told(old) != told(new):
                name = (new or old).name
                return (
                    f"parameter '{name}' was {told(old)} and is {told(new)} now; change a model "
                    "on all ranks alike"
                )
        return "it was registered anew"

    def _broadcast(self) -> None:
        params = [(name, param) for name, param, _ in self._names()]
        if params:
            _adapter.api.broadcast_parameters(params, root_rank=0)

    def _is_registered(self) -> bool:
        if self._core is None or self._communicator is not _runtime.communicator():
            return False
        count = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    slot = self._slots.get(param)
                    if slot is None or not slot.fits():
                        return False
                    count += 1
        return count == len(self._slots)

    # ---- One step.

    def _begin(self) -> None:
        if not self._is_registered():
            self._register(_runtime.communicator())
        self._hypers = self._read_hypers()
        self._core.set_hypers(self._hypers)
        self._stepping = True

    def _read_hypers(self) -> list[list[float]]:
        return [self._hyper_of(group) for group in self.param_groups]

    def _hyper_of(self, group: dict[str, Any]) -> list[float]:
        values = [_number(group.get(key, 0.0)) for key, _, _ in self._limits]
        for (key, lowest, highest), value in zip(self._limits, values):
            if not (isinstance(value, float) and lowest <= value <= highest):
                raise BluefogValueError(
                    f"{self._where}: {key} is {value!r}, but must be a finite number >= {lowest:g}"
                    + (f" and <= {highest:g}" if highest < sys.float_info.max else "")
                )
        return values

    def _give(
        self,
        give: Callable[..., Any],
        slot: _Slot,
        gradient: torch.Tensor | None,
        reset: bool = False,
    ) -> None:
        """Bind x, g and the state of one parameter as they are now: bind or ready of the core."""
        param = slot.param
        state = self.state[param]
        if gradient is not None and gradient.layout is not torch.strided:
            raise BluefogValueError(
                f"{self._where}: the gradient of parameter '{slot.name}' is sparse: use "
                "sparse=False in its layer, or an optimizer of PyTorch for this parameter"
            )
        x, g = to_dlpack(param), None if gradient is None else to_dlpack(gradient)
        try:
            states = [to_dlpack(state[name]) for name in self._state_names]
        except (KeyError, TypeError):  # Cleared, or not a tensor.
            self._make_state(param, reset)
            states = [to_dlpack(state[name]) for name in self._state_names]
        mismatch = give(slot.index, x, g, *states)
        if not mismatch:
            slot.hold(gradient)
            return
        if mismatch == _PARAMETER:
            raise BluefogError(
                f"{self._where}: parameter '{slot.name}' is now {param.dtype}{list(param.shape)} "
                f"with strides {param.stride()} but was {slot.dtype}{list(slot.shape)} with "
                f"strides {slot.stride} when this step began: change a model between "
                "steps, not within one"
            )
        if mismatch == _GRADIENT:
            # Of another memory order than the parameter: the engine goes through both alike.
            gradient = torch.empty_like(param, requires_grad=False).copy_(gradient)
        else:
            self._make_state(param, reset)
        self._give(give, slot, gradient, reset)

    def _on_gradient(self, param: torch.Tensor) -> None:
        """The hook: the gradient of one parameter is there."""
        if not self._syncing:
            return
        if not self._stepping:
            self._begin()
        slot = self._slots.get(param)
        if slot is None:
            return
        if slot.grad is not None:
            self._fail(
                f"parameter '{slot.name}' got a second gradient in one step: a second backward() "
                "before step() is for `with optimizer.no_sync():` around all but the last one, or "
                + _LOCAL_CURE
            )
        gradient = param.grad
        try:
            self._give(self._core.ready, slot, gradient)
        except BluefogError as error:
            if error.code == "UNAVAILABLE":
                raise
            self._fail(str(error), error)
        slot.grad = gradient
        # A graph that still holds the old values must not be run backward any more.
        increment_version(param)
        slot.versions = (param._version, gradient._version)

    def _fail(self, message: str, cause: Exception | None = None) -> None:
        """End the step that was begun, so that no neighbour waits for it; then raise."""
        self._finish(use_gradients=False)
        prefix = "" if message.startswith("rank ") else f"{self._where}: "
        kind = type(cause) if isinstance(cause, BluefogError) else BluefogError
        raise kind(
            f"{prefix}{message}. The step that was begun has been completed with the gradients as "
            "they were when they became ready"
        ) from cause

    def _misuse(self) -> str | None:
        """What happened between the hooks and step() that must not, or None."""
        for slot in self._slots.values():
            if slot.grad is None:
                continue
            param, now = slot.param, slot.param.grad
            version, grad_version = slot.versions
            if now is not slot.grad or now._version != grad_version:
                what = "removed" if now is None else "changed"
                return (
                    f"the gradient of parameter '{slot.name}' was {what} after it became ready and "
                    "before step(), when it had been sent already: to change gradients, "
                    + _LOCAL_CURE
                )
            replaced = param.data_ptr() != slot.address
            if replaced or (slot.alone and param._version != version):
                return (
                    f"parameter '{slot.name}' was {'replaced' if replaced else 'written to'} after "
                    "its gradient became ready and before step(), when it was the engine's: change "
                    f"a model after step(), or {_LOCAL_CURE}"
                )
        for g, (old, group) in enumerate(zip(self._hypers, self.param_groups)):
            for (key, _, _), a in zip(self._limits, old):
                b = _number(group.get(key, 0.0))
                if a != b:
                    name = next(
                        (n for n, p, i in self._names() if i == g and p in self._slots), "?"
                    )
                    return (
                        f"{key} of group {g} (parameter '{name}', …) was {a} when the first "
                        f"gradient became ready and is {b} at step(): change it after step() (as "
                        f"schedulers do), or {_LOCAL_CURE}"
                    )
        return None

    def _finish(self, use_gradients: bool, scale: float | None = None) -> None:
        """Bind what was not ready, run the step to its end and count it."""
        if not self._core.begun:
            for slot in self._slots.values():
                if slot.grad is None:
                    if not use_gradients and not slot.fits():
                        # A step that fails goes through; what comes of this parameter is dropped.
                        x = slot.stand_in()
                        states = [torch.zeros_like(x) for _ in self._state_names]
                        self._core.bind(slot.index, to_dlpack(x), None, *map(to_dlpack, states))
                        continue
                    gradient = slot.param.grad if use_gradients else None
                    if gradient is not None and scale is not None:
                        gradient = gradient * scale
                    # A step that fails goes through, whatever state it finds.
                    self._give(self._core.bind, slot, gradient, reset=not use_gradients)
        try:
            self._core.run_step()
        finally:
            # After Ctrl-C the step goes on: the next call waits for it.
            if not self._core.begun:
                self._stepping = False
                for slot in self._slots.values():
                    slot.grad = None
                    slot.grad_storage = None
                if self._slots:
                    increment_version([slot.param for slot in self._slots.values()])
        for group in self.param_groups:
            group["step"] = self._core.step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Complete one step: average with the neighbours and update the parameters.

        Returns once every parameter of this rank is updated. Answers Ctrl-C; the step then goes
        on, and the next call waits for it.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again (zero_grad, forward, backward) and returns the loss. Called
            once.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        BluefogError
            A rank died or left (``code`` "UNAVAILABLE"; parameters may be partly updated), a
            neighbour never stepped, or, under overlap, a gradient or hyper-parameter was changed
            after it became ready. The message names the parameter and the cure; the class's notes
            say what became of the step.
        """
        loss = None
        if closure is not None and not (self._stepping and self._core.begun):
            with torch.enable_grad():
                loss = closure()
        if self._stepping and self._core.begun:
            self._finish(use_gradients=False)
            return loss
        ready = self._stepping
        if not ready:
            self._begin()
        scale = found_inf = None
        if getattr(self, "found_inf", None) is not None:  # Set by GradScaler around this call.
            found_inf = bool(self.found_inf.item())
            if getattr(self, "grad_scale", None) is not None:
                scale = 1.0 / float(self.grad_scale.item())
        if ready:
            if found_inf is not None and (found_inf or scale is not None):
                self._fail(
                    "a GradScaler changes gradients at step(), when they had been sent already: "
                    + _LOCAL_CURE
                )
            misuse = self._misuse()
            if misuse is not None:
                self._fail(misuse)
        try:
            self._finish(use_gradients=not found_inf, scale=scale)
        except BluefogError as error:
            if not self._stepping:
                raise
            self._fail(str(error), error)
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Take what is under way with ``overlap="delayed"``: x becomes W x; else do nothing.

        Every rank calls it at the same step, between ``step()`` and ``backward()``: after the last
        step, say, to have models that were averaged once more. A checkpoint does not need it: what
        is under way is the model itself, and whoever starts from the checkpoint sends it again, so
        that training goes on bit for bit. Answers Ctrl-C, and can be called again.

        Raises
        ------
        BluefogError
            Between ``backward()`` and ``step()``; a rank died or left.
        """
        if self._stepping:
            raise BluefogError(
                f"{self._where}: synchronize between backward() and step(); call step() first"
            )
        if not self._delayed or not self._is_registered():
            return
        for slot in self._slots.values():
            self._give(self._core.bind, slot, None)
        self._core.synchronize()
        if self._slots:
            increment_version([slot.param for slot in self._slots.values()])

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, ``backward()`` only accumulates gradients and nothing is sent.

        >>> with optimizer.no_sync():  # doctest: +SKIP
        ...     loss(first_half).backward()
        >>> loss(second_half).backward()  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP
        """
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _on_gradient(reference: Callable[[], DistributedOptimizer | None], param: torch.Tensor) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer._on_gradient(param)
