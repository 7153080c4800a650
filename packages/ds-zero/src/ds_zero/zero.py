"""`Zero(...)`: what to shard and how, as one frozen value; `shard(...)`: a model and an optimizer at once."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from torch import nn
from torch.optim import Optimizer

from ds_core.ground.mesh import Mesh
from ds_core.ground.settings import Setting
from ds_core.limits import refuse
from ds_core.protocols import Codec, Store
from ds_core.setup.config import Config
from ds_core.state.hooks import dtype_of
from ds_core.state.layout import Cut
from ds_core.state.owner import FlatOwner, ReplicatedOwner
from ds_core.state.route import GradientRoute, ParamRoute
from ds_core.train.optim import ShardedOptimizer, cut_of_model
from ds_zero.fill import Initializer, refuse_meta
from ds_zero.owner import ZeroOwner
from ds_zero.stages import Lifetime, lifetime_of

DtypeName = Literal["float32", "bfloat16", "float16"]


class Zero(Config):
    """ZeRO's settings. Everything has one default; `stage` is the only choice that most people make."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    stage: Literal[1, 2, 3] = Field(
        description="1: optimizer state is cut; 2: gradients too; 3: parameters too"
    )
    dtype: DtypeName | None = Field(
        default=None,
        description="dtype of the parameters; below 32 bits, with fp32 masters. None: as they are",
    )
    grad_dtype: DtypeName | None = Field(
        default=None,
        description="dtype in which gradients accumulate; None: the masters' (fp32 in mixed precision)",
    )
    keep_fp32: tuple[str, ...] = Field(
        default=(),
        description='patterns of parameter or module names that stay fp32, such as ("*norm*", "lm_head")',
    )
    cut: Cut | frozenset[str] = Field(
        default="flat",
        description="flat: anywhere; whole: each parameter on one rank; names: whole where a unit holds one",
    )
    bucket_numel: int = Field(
        default=1_000_000, ge=1, description="neighbours are put together up to this many elements"
    )
    prefetch_numel: int = Field(
        default=20_000_000, ge=0, description="elements gathered ahead of their use at stage 3; 0: none"
    )
    keep_numel: int = Field(
        default=20_000_000,
        ge=0,
        description="stage 3: elements, the last of a forward, that stay whole into the backward; 0: none",
    )
    persist_numel: int = Field(
        default=0, ge=0, description="stage 3: units below this many elements stay whole"
    )
    leaves: tuple[str, ...] = Field(
        default=(),
        description="patterns of module names that are never split into several units, for modules of "
        "which ranks run different parts",
    )
    secondary_shard: bool = Field(
        default=False,
        description="stage 3 on a mesh with dp_replicate > 1: cut over all data ranks, and keep what the "
        "forward gathered as a second shard inside each node (hpZ)",
    )
    overlap: bool = Field(
        default=True, description="communicate while computing; False waits for every collective"
    )
    initializer: Initializer | None = Field(
        default=None,
        description="fn(module) that fills a meta module's parameters; None: its reset_parameters()",
    )

    @property
    def lifetime(self) -> Lifetime:
        return lifetime_of(self.stage)

    @property
    def param_dtype(self) -> torch.dtype | None:
        return dtype_of(self.dtype)

    @property
    def accumulate_dtype(self) -> torch.dtype | None:
        return dtype_of(self.grad_dtype)

    def settings(self, world: int) -> list[Setting]:
        """Every field: its value, where it came from, what it does on `world` ranks, or why it does not."""
        found = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            idle = ""
            if world == 1 and name == "overlap":
                idle = "one rank has nobody to talk to: "
            elif (
                name in ("prefetch_numel", "keep_numel", "persist_numel", "secondary_shard")
                and self.stage != 3
            ):
                idle = f"not at stage {self.stage}: "
            elif value in (None, 0, False, ()):
                idle = "off: "
            shown = value if isinstance(value, int | str | None) else getattr(value, "__name__", repr(value))
            acts = f"{idle}{field.description}"
            found.append(Setting(f"zero.{name}", shown, self.origin(name), acts, not idle))
        return found

    def shard(
        self,
        model: nn.Module,
        mesh: Mesh | None = None,
        *,
        store: Store | None = None,
        gather: Codec | ParamRoute | None = None,
        reduce: Codec | GradientRoute | None = None,
    ) -> ZeroOwner:
        """Take over the model's parameters, in place. Collective over the mesh (None: all ranks)."""
        return ZeroOwner(model, mesh, self, store=store, gather=gather, reduce=reduce)


def shard(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    stage: int,
    mesh: Mesh | None = None,
    dtype: torch.dtype | None = None,
    store: Store | None = None,
    gather: Codec | ParamRoute | None = None,
    reduce: Codec | GradientRoute | None = None,
) -> tuple[nn.Module, Optimizer]:
    """Shard a model and its optimizer for a plain PyTorch loop; both come back as the objects they were.

    Gradients are averaged over the data-parallel ranks, as DDP does, however many backwards come before
    `optimizer.step()`: the step is the boundary, there is no flag to set. `dtype=torch.bfloat16` makes
    parameters bf16 with fp32 masters. After `optimizer.step()` returns, whole parameters (stages 1, 2)
    are the new ones. Clip with `ds_zero.clip_grad_norm_(optimizer, max_norm)`. Works on one process too.
    `stage=0` keeps everything whole on every rank. An optimizer that reduces gradients in its own way (a
    `route`, as 1-bit Adam has) is given them unless `reduce` says otherwise. Collective.
    """
    reduce = reduce if reduce is not None else getattr(optimizer, "route", None)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    owner: FlatOwner
    if stage == 0:
        refuse(0, {"gather codec"} if gather is not None else ())
        refuse_meta(model)
        owner = ReplicatedOwner(model, mesh, dtype=dtype, store=store, reduce=reduce)
    else:
        config = Zero(stage=stage, dtype=name, cut=cut_of_model(model, optimizer))  # type: ignore[arg-type]
        owner = config.shard(model, mesh, store=store, gather=gather, reduce=reduce)
    ShardedOptimizer(optimizer, owner)
    return model, optimizer
