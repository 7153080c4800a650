"""A model that only computes, its weights wherever a store keeps them: fetched layer by layer and let go."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ds_core.ground.mesh import Mesh
from ds_core.protocols import Store
from ds_zero.zero import Zero

M = TypeVar("M", bound=nn.Module)


def inference(
    model: M,
    *,
    store: Store | None = None,
    dtype: torch.dtype | None = None,
    mesh: Mesh | None = None,
    prefetch_numel: int = 20_000_000,
) -> M:
    """Freeze a model, put it into evaluation mode and cut it (ZeRO-Inference); the same object comes back.

    With `store=ds_offload.TieredStore(params="nvme", nvme="/disk")` its weights live on disk, and a forward
    holds the unit that computes and up to `prefetch_numel` elements that come next (at least one unit). A
    model from `ds_zero.from_pretrained` or `materialize()` gets there unit by unit and is never whole in
    memory. Several ranks read their own parts and gather. Run it under `torch.no_grad()`. Collective.
    """
    model.requires_grad_(False)
    model.eval()
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    config = Zero(stage=3, dtype=name, prefetch_numel=prefetch_numel, keep_numel=0)  # type: ignore[arg-type]
    config.shard(model, mesh, store=store)
    return model
