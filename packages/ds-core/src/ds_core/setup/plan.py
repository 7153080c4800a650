"""What a DeepSpeed config comes to: frozen values that the objects are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ds_core.ground.settings import Setting
from ds_core.setup.config import Config

Dtype = Literal["float32", "bfloat16", "float16"]


class Named(Config):
    """An object by name, as a registry builds it. `kernel`: a faster one of the same effect."""

    type: str
    kernel: str | None = None
    params: Mapping[str, Any] = Field(default_factory=dict)


class LossScale(Config):
    """How the loss is scaled: `static` is a fixed factor, else it moves with overflows."""

    static: float | None = None
    initial: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0


class CommsLogging(Config):
    """What ds_comm's CommLog is told; `ops`: only these, by its names."""

    ops: tuple[str, ...] | None = None
    verbose: bool = False
    debug: bool = False

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Reporting(Config):
    """What is said while training, and how often."""

    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    throughput: bool = True
    synchronize: bool = True
    dump_state: bool = False
    log_level: str | None = None
    sinks: tuple[Mapping[str, Any], ...] = ()
    comms: CommsLogging | None = None


class Zero(Config):
    """The fields of ds_zero's Zero that a file speaks of; None leaves the package's own default."""

    grad_dtype: Dtype | None = None
    keep_fp32: tuple[str, ...] | None = None
    bucket_numel: int | None = None
    prefetch_numel: int | None = None
    keep_numel: int | None = None
    persist_numel: int | None = None
    leaves: tuple[str, ...] | None = None
    secondary_shard: bool | None = None
    overlap: bool | None = None


class Offload(Config):
    """Where state lives between its uses, as ds_offload's TieredStore is told; None leaves its default.

    `params_in_host`: of parameters on nvme, how many elements of a rank's shards stay in host memory.
    """

    nvme: str | None = None
    params: str = "device"
    grads: str = "device"
    masters: str = "device"
    moments: str = "device"
    params_in_host: int | None = None
    chunk_numel: int | None = None
    queue_depth: int | None = None
    block_bytes: int | None = None
    update: str | None = None
    zenflow: Mapping[str, Any] | None = None

    def spec(self, shard_numel: int) -> dict[str, Any]:
        """What `plugins.resolve("store", ...)` takes, for a rank whose shards have `shard_numel` elements."""
        chosen = {name: value for name, value in self.model_dump().items() if value is not None}
        in_host = chosen.pop("params_in_host", None)
        if in_host is not None:
            host = min(1.0, in_host / max(1, shard_numel))
            ends = {0.0: "nvme", 1.0: "host"}
            chosen["params"] = ends.get(host, f"{host:.9g} host / {1 - host:.9g} nvme")
        return {"type": "tiered", **chosen}


class Wire(Config):
    """What travels quantised, as ZeRO++ does. `loco`: how errors are fed back; `marks`: NaN gets through."""

    weights: bool = False
    gradients: bool = False
    loco: Mapping[str, Any] | None = None
    marks: bool = False


class Plan(Config):
    """Everything `initialize` builds from. Made by `deepspeed_json.translate`."""

    world: int
    train_batch_size: int
    micro_batch_size: int
    accumulate: int
    stage: Literal[0, 1, 2, 3] = 0
    dtype: Dtype = "float32"
    autocast: Dtype | None = None
    cast_inputs: bool = False
    loss_scale: LossScale | None = None
    skip_overflow: bool = False
    max_norm: float | None = 1.0
    zero: Zero = Zero()
    offload: Offload | None = None
    wire: Wire | None = None
    cpu_checkpointing: bool = False
    node_ranks: int | None = None  # ranks that shard among them, where that is not all
    optimizer: Named | None = None
    scheduler: Named | None = None
    reporting: Reporting = Reporting()
    drop_last: bool = False
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    disable_python_gc: bool = False
    allow_untested_optimizer: bool = True
    notices: tuple[str, ...] = ()
    keys: tuple[Setting, ...] = ()

    def owner_spec(self) -> dict[str, Any]:
        """What `plugins.resolve("owner", ...)` takes at stages 1 to 3."""
        chosen = {name: value for name, value in self.zero.model_dump().items() if value is not None}
        dtype = None if self.dtype == "float32" else self.dtype
        return {"type": "zero", "stage": self.stage, "dtype": dtype, **chosen}
