"""What the fused torch.optim optimizers share: gathering lists, scaling, copies, undo, loading of states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_kernels.native import DTYPES
from ds_kernels.ops.optim.rules import Hyper
from ds_kernels.ops.optim.step import StepLists, optim_step_, undo_step_
from ds_kernels.registry import load

Loss = TypeVar("Loss")
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# How torch's own optimizers choose their implementation: in their checkpoints, without meaning here.
_TORCH_SWITCHES = ("foreach", "capturable", "differentiable", "fused", "amsgrad")


class Slot(NamedTuple):
    """One parameter in one step; a `fresh` one has not been stepped before."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    copy: Tensor | None
    fresh: bool


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
        for group in self.param_groups:
            hyper = self._hyper(group)
            for slots in self._batches(group):
                steps = [slot.state["step"] for slot in slots] if self._counts else []
                counted = [int(step.item()) + 1 for step in steps] or [
                    1 if slot.fresh else 2 for slot in slots
                ]
                self._run(slots, counted, hyper, {"grad_coef": coef, "seed": group["seed"]})
                if steps:
                    torch._foreach_add_(steps, one, alpha=1.0)
                self._stepped += slots if self.keep_undo else ()
            if group["seed"] is not None:
                group["seed"] += 1
        return loss

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
        for param in group["params"]:
            grad = self.low_precision_grads.get(param) if self.low_precision_grads else None
            if grad is None:
                grad = param.grad
            if grad is None:
                continue
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
            batch.append(Slot(param, grad, state, copy, fresh))
        return list(batches.values())

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
