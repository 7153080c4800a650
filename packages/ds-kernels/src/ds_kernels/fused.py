"""What the fused torch.optim optimizers share: gathering lists, scaling, copies, undo, loading of states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_kernels.native import DTYPES
from ds_kernels.ops.optim.repeat import Gathered, Repeat, intercepted
from ds_kernels.ops.optim.rules import Hyper
from ds_kernels.ops.optim.step import StepLists, optim_step_, undo_step_
from ds_kernels.registry import load

Loss = TypeVar("Loss")
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# How torch's own optimizers choose their implementation: in their checkpoints, without meaning here.
_TORCH_SWITCHES = ("foreach", "capturable", "differentiable", "fused", "amsgrad")


class Slot(NamedTuple):
    """One parameter in one step; a `fresh` one has not been stepped before."""

    place: int  # among the parameters of its group that have a gradient
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    copy: Tensor | None
    fresh: bool


class Batch(NamedTuple):
    """What one step of a group leaves for the next: see [Note: a repeated step] in ops/optim/repeat.py."""

    places: list[int]  # of its slots
    repeat: Repeat
    counts: Tensor  # of steps made: one tensor, and each `state["step"]` is a view of an element
    addresses: list[int]  # of these views


class FusedOptimizer(Optimizer):
    """A torch.optim optimizer over a fused step: one pass over memory, fp32 arithmetic for all dtypes.

    Beside torch's own surface:
    `copy_out[param]`: a tensor of the same numel, fp32, bf16 or fp16, that gets the new values as well.
    `low_precision_grads[param]`: a gradient used instead of `param.grad`, in any of the three dtypes.
    `grad_scale`: gradients are divided by it (float or one-element tensor; torch's own convention, which
    torch.amp.GradScaler sets and deletes around `step`). `clip_coef`: gradients are multiplied by it.
    `found_inf`: when set and not zero, `step` changes nothing; reading it waits for a GPU.
    `state_dtype`: of the moments. bf16 moments rounded to nearest stand still where a step changes them by
    less than half a unit (with beta2 = 0.999 always), so set `seed` too: rounding by chance, right in the
    mean, of bf16 moments and bf16 parameters. It counts steps, and is part of the state.
    `keep_undo`: while true a step keeps what it overwrites (as many bytes again), and `undo` puts it back.
    """

    elementwise = True  # each element is updated on its own, so parameters may be cut anywhere
    grad_scale: float | Tensor = 1.0
    clip_coef: float | Tensor = 1.0
    found_inf: float | Tensor | None = None
    state_dtype = torch.float32
    keep_undo = False
    copy_out: dict[Tensor, Tensor]
    low_precision_grads: dict[Tensor, Tensor]
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to `step`
    _states: ClassVar[tuple[str, ...]]  # torch's names for the rule's states, in its order
    _counts = True  # does torch keep a `step` beside them?

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._hyper(defaults)
        super().__init__(params, {**defaults, "seed": None})
        self.copy_out, self.low_precision_grads = {}, {}
        self._kept: dict[Tensor, list[Tensor]] = {}
        self._stepped: list[Slot] = []
        self._batched: dict[int, list[Batch]] = {}
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            load("optim", device)

    @property
    def seed(self) -> int | None:
        """What rounding by chance draws from in the next step; None rounds to nearest."""
        found: int | None = self.param_groups[0]["seed"]
        return found

    @seed.setter
    def seed(self, value: int | None) -> None:
        for group in self.param_groups:
            group["seed"] = value

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        """The rule with the numbers of a group. Raises ValueError for those that do not fit."""
        raise NotImplementedError

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What a parameter starts with."""
        state = {name: torch.zeros_like(param, dtype=self.state_dtype) for name in self._states}
        return {"step": torch.tensor(0.0), **state} if self._counts else state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does. Raises ValueError for a parameter of an unknown dtype."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in DTYPES:
                self.param_groups.pop()
                raise ValueError(
                    f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is {param.dtype}; "
                    f"allowed are {', '.join(map(str, DTYPES))}"
                )

    # -- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped = []
        if self.found_inf is not None and float(self.found_inf):
            return loss
        coef, one = self._grad_coef(), torch.tensor(1.0)  # a tensor: adding the number wraps it once per step
        past_dispatcher = not intercepted()
        for number, group in enumerate(self.param_groups):
            hyper, more = self._hyper(group), {"grad_coef": coef, "seed": group["seed"]}
            if not (past_dispatcher and self._step_again(number, group, hyper, more)):
                self._batched.pop(number, None)
                batches = self._batches(group)
                for slots in batches:
                    self._step_batch(slots, hyper, more, one)
                if past_dispatcher and not self.keep_undo:
                    self._batched[number] = self._leave(batches, hyper)
            if group["seed"] is not None:
                group["seed"] += 1
        return loss

    def _step_batch(self, slots: list[Slot], hyper: Hyper, more: dict[str, Any], one: Tensor) -> None:
        steps = [slot.state["step"] for slot in slots] if self._counts else []
        counted = [int(step.item()) + 1 for step in steps] or [1 if slot.fresh else 2 for slot in slots]
        self._run(slots, counted, hyper, more)
        if steps:
            torch._foreach_add_(steps, one, alpha=1.0)
        self._stepped += slots if self.keep_undo else ()

    def _run(self, slots: list[Slot], steps: list[int], hyper: Hyper, more: dict[str, Any]) -> None:
        used = self._states[: len(hyper.used())]
        kept = [self._keepers(slot, used) for slot in slots] if self.keep_undo else []
        lists = StepLists(
            [slot.param for slot in slots],
            [slot.grad for slot in slots],
            [[slot.state[name] for slot in slots] for name in used],
            steps,
            [slot.copy for slot in slots if slot.copy is not None],
            [tensor for part in zip(*kept, strict=True) for tensor in part],
        )
        optim_step_(lists, hyper, **more)

    def _batches(self, group: dict[str, Any]) -> list[list[Slot]]:
        """The parameters that have a gradient, in lists of one device and one dtype per role."""
        batches: dict[tuple[object, ...], list[Slot]] = {}
        last: tuple[object, ...] = ()
        batch: list[Slot] = []
        for place, (param, grad) in enumerate(zip(*self._with_gradient(group["params"]), strict=True)):
            if grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__}: the gradient of a parameter {tuple(param.shape)} is sparse; "
                    "use torch.optim.SparseAdam for it, or sparse=False in its embedding"
                )
            copy = self.copy_out.get(param) if self.copy_out else None
            state = self.state[param]
            fresh = not state
            if fresh:
                load("optim", param.device)  # the constructor may have seen others: shards replace them
                state.update(self._new_state(param, group))
            out = copy if copy is None else copy.dtype
            kinds = [state[name].dtype for name in self._states if name in state]
            key = (param.device, param.dtype, grad.dtype, out, *kinds)
            if key != last:  # mostly it is not: comparing is cheaper than hashing
                last, batch = key, batches.setdefault(key, [])
            batch.append(Slot(place, param, grad, state, copy, fresh))
        return list(batches.values())

    def _with_gradient(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the gradients to use."""
        grads = [param.grad for param in params]
        if self.low_precision_grads:
            low = map(self.low_precision_grads.get, params)
            grads = [grad if other is None else other for other, grad in zip(low, grads, strict=True)]
        if type(None) in set(map(type, grads)):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        return params, [grad for grad in grads if grad is not None]

    # -- the same step again -------------------------------------------------------------------------------

    def _step_again(self, number: int, group: dict[str, Any], hyper: Hyper, more: dict[str, Any]) -> bool:
        """Step a group of which only values and gradients have changed; else False, and nothing is done."""
        batched = self._batched.get(number, ())
        if not batched or self.keep_undo:
            return False
        params, grads = self._with_gradient(group["params"])
        if len(params) != sum(len(batch.places) for batch in batched):
            return False
        found = []
        for batch in batched:
            whole = len(batched) == 1
            mine = params if whole else [params[i] for i in batch.places]
            theirs = grads if whole else [grads[i] for i in batch.places]
            states = [self.state[param] for param in mine]
            try:
                ready = batch.repeat.ready(hyper, self._gathered(mine, theirs, states, hyper))
                counts = [state["step"].data_ptr() for state in states] if self._counts else []
            except (AttributeError, KeyError, RuntimeError, TypeError):  # a state may hold anything by now
                return False
            if ready is None or counts != batch.addresses:
                return False
            found.append(ready)
        for batch, ready in zip(batched, found, strict=True):
            counted = [int(count) + 1 for count in batch.counts.tolist()]
            ready.run(counted or [2] * len(batch.places), more["grad_coef"], more["seed"])
            batch.counts.add_(1.0)
        return True

    def _leave(self, batches: list[list[Slot]], hyper: Hyper) -> list[Batch]:
        """What makes the next step of these cheap, if all of them can have it."""
        left = []
        for slots in batches:
            states = [slot.state for slot in slots]
            grads = [slot.grad for slot in slots]
            repeat = Repeat.of(hyper, self._gathered([slot.param for slot in slots], grads, states, hyper))
            if repeat is None:
                return []
            made = [float(state["step"]) for state in states] if self._counts else []
            counts = torch.tensor(made, dtype=torch.float32, device="cpu")
            views = list(counts.unbind())
            for state, view in zip(states, views, strict=self._counts):
                state["step"] = view
            left.append(
                Batch([slot.place for slot in slots], repeat, counts, [view.data_ptr() for view in views])
            )
        return left

    def _gathered(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], hyper: Hyper
    ) -> Gathered:
        copies = map(self.copy_out.get, params) if self.copy_out else ()
        used = self._states[: len(hyper.used())]
        parts = [[state[name] for state in states] for name in used]
        return Gathered(params, grads, parts, [copy for copy in copies if copy is not None])

    def _grad_coef(self) -> Tensor | None:
        """clip_coef / grad_scale as one number; None for 1. On a GPU it stays there: nothing waits."""
        clip, scale = self.clip_coef, self.grad_scale
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (clip, scale)):
            coef = clip / scale
            return coef if isinstance(coef, Tensor) else torch.tensor(coef)
        ratio = float(clip) / float(scale)
        return None if ratio == 1.0 else torch.tensor(ratio, dtype=torch.float64)

    # -- undo ----------------------------------------------------------------------------------------------

    def _keepers(self, slot: Slot, used: Sequence[str]) -> list[Tensor]:
        """Where a parameter and its states are kept; allocated once."""
        tensors = [slot.param, *(slot.state[name] for name in used)]
        kept = self._kept.get(slot.param, [])
        if [(t.shape, t.dtype, t.device) for t in kept] != [(t.shape, t.dtype, t.device) for t in tensors]:
            kept = self._kept[slot.param] = [torch.empty_like(t, requires_grad=False) for t in tensors]
        return kept

    @torch.no_grad()
    def undo(self) -> None:
        """Take back the last step, made with `keep_undo`: parameters, states, seeds, bit for bit.

        `copy_out` gets the old parameters, rounded again. A step that `found_inf` skipped needs no undo.
        Raises: RuntimeError when there is no step to take back.
        """
        if not self._stepped:
            raise RuntimeError(
                f"{type(self).__name__}.undo: there is no step to take back; set keep_undo before `step`, "
                "and undo once"
            )
        tensors, kept = [], []
        for slot in self._stepped:
            kept += self._kept[slot.param]
            tensors += [slot.param, *(slot.state[name] for name in self._states if name in slot.state)]
        undo_step_(StepLists(tensors, (), (), (), saved=kept))
        for slot in self._stepped:
            if slot.copy is not None:
                slot.copy.copy_(slot.param.reshape(slot.copy.shape))
            if slot.fresh:
                self.state[slot.param] = {}
            elif self._counts:
                slot.state["step"] -= 1
        for group in self.param_groups:
            if group["seed"] is not None:
                group["seed"] -= 1
        self._stepped = []

    # -- states --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's own. Raises ValueError for an amsgrad state."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError(
                f"{type(self).__name__}: this state was made with amsgrad=True, which is not here; "
                "continue it with torch.optim, or drop `amsgrad` and `max_exp_avg_sq` from it"
            )
        super().load_state_dict(state_dict)
        self._restore_states(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in (
            "copy_out",
            "low_precision_grads",
            "_kept",
        ):  # no part of the state: copies start without
            self.__dict__.setdefault(name, {})
        self.__dict__.setdefault("_stepped", [])
        self._batched = {}
        for group in self.param_groups:
            for name in _TORCH_SWITCHES:
                group.pop(name, None)
            group.setdefault("maximize", False)
            group.setdefault("seed", None)

    def _restore_states(self, saved: dict[str, Any]) -> None:
        """Undo torch's cast of a loaded state to the parameter's dtype; keep steps on the host."""
        keys = (key for group in saved["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for key, param in zip(keys, params, strict=True):
            mine = self.state.get(param)
            if not mine:
                continue
            if self._counts:
                mine["step"] = torch.as_tensor(mine["step"], dtype=torch.float32).cpu()
            for name in self._states:
                if mine.get(name) is None:  # torch's SGD without momentum
                    mine.pop(name, None)
                elif mine[name].dtype != self.state_dtype:
                    theirs = saved["state"][key][name]
                    mine[name] = theirs.to(param.device, self.state_dtype, copy=True)
