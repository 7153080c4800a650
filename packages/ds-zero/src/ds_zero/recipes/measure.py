"""What a rank really holds and sends, beside the formulas of the ZeRO paper (Rajbhandari et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ds_core.setup.estimate import DTYPE_BYTES, STAGES, Recipe, estimate
from ds_zero.recipes.record import Measured


@dataclass(frozen=True, slots=True)
class Setting:
    """What the formulas depend on."""

    numel: int  # the paper's psi: parameters of the model
    world: int
    stage: int
    accumulate: int
    dtype: str
    num_states: int  # fp32 optimizer states per parameter: 2 for Adam

    @property
    def recipe(self) -> Recipe:
        """Gradients accumulate in fp32; below 32 bits the optimizer holds an fp32 master as well."""
        return Recipe(self.dtype, "float32", self.num_states)


def storage_bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the storages behind `tensors`, each counted once; `seen` holds those counted before."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def state_formulas(s: Setting) -> dict[str, tuple[float, str]]:
    """Bytes per rank of parameters, gradients and optimizer state: the paper's figure 1."""
    recipe = s.recipe
    found = estimate(s.numel, ranks=s.world, stage=STAGES[s.stage], recipe=recipe)
    rows = {
        "parameters": (found.params, recipe.param_bytes, 3),
        "gradients": (found.grads, recipe.grad_bytes, 2),
        "optimizer state": (found.optimizer, round(recipe.optimizer_bytes), 1),
    }
    return {
        name: (value, f"{each} x {s.numel:,}" + (f" / {s.world}" if s.stage >= cut_from else ""))
        for name, (value, each, cut_from) in rows.items()
    }


def wire_formula(s: Setting) -> tuple[float, str]:
    """Bytes that one rank sends per optimizer step: 2 psi at stages 1 and 2, 3 psi at stage 3, times (W-1)/W.

    With A micro batches stage 2 reduces A times, and stage 3 gathers 2 A times and reduces A times. Stage 0
    all-reduces: a reduce-scatter and an all-gather.
    """
    gathers = 2 * s.accumulate if s.stage == 3 else 1
    reduces = s.accumulate if s.stage >= 2 else 1
    each = DTYPE_BYTES[s.dtype]
    how = f"({gathers} + {reduces}) x {each} x {s.numel:,} x {s.world - 1}/{s.world}"
    return (gathers + reduces) * each * s.numel * (s.world - 1) / s.world, how


def beside(measured: dict[str, int], formulas: dict[str, tuple[float, str]]) -> dict[str, Measured]:
    """Both in one table."""
    return {name: Measured(measured[name], *formula) for name, formula in formulas.items()}
