"""A DeepSpeed JSON in place of the flags it has keys for: `--config FILE`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_core.ground.settings import Origin
from ds_core.setup.config import Layer, merge
from ds_core.setup.deepspeed_json import translate
from ds_core.setup.source import read_layer
from ds_zero.recipes.flags import Settings


def with_config(settings: Settings, typed: Collection[str], world: int) -> Settings:
    """The settings with what the file says; flags typed beside it (when resuming) win.

    Raises: ConfigError (a ValueError) with every problem of the file.
    """
    if settings.config is None:
        return settings
    plan = translate(settings.config, world=world)
    said: dict[str, Any] = {
        "stage": plan.stage,
        "dtype": plan.dtype,
        "batch": plan.micro_batch_size,
        "accumulate": plan.accumulate,
        "clip": plan.max_norm or 0.0,
    }
    return replace(settings, **{name: value for name, value in said.items() if name not in typed})


def config_for(file: Path, *, stage: int, batch: int, accumulate: int, world: int) -> dict[str, Any]:
    """The file's keys, at the stage and the batch sizes of one phase."""
    phase = {
        "train_batch_size": batch * accumulate * world,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage},
    }
    tree, _ = merge([read_layer(file), Layer(phase, Origin("code", "this phase of the recipe"))])
    return tree
