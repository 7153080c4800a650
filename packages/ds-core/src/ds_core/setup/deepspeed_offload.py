"""What a DeepSpeed file says about state off the device: its sections as one `Offload` (pure)."""

from __future__ import annotations

from collections.abc import Callable

from ds_core.setup.deepspeed_zenflow import fields_of, without_effect
from ds_core.setup.findings import Findings
from ds_core.setup.plan import Offload

_TIERS = {"cpu": "host", "nvme": "nvme"}
_CHUNK_NUMEL = 1 << 22, 4096  # ds_offload's own chunk, and the smallest


def plan_offload(found: Findings, stage: int, dtype: str) -> Offload | None:
    """Everything that is off the device, or None when nothing is. Problems are noted."""

    def key(name: str) -> str:
        return f"zero_optimization.{name}"

    optimizer = _device(found, key("offload_optimizer"), key("cpu_offload"))
    params = _device(found, key("offload_param"), key("cpu_offload_param"))
    zenflow, early = found.get(key("zenflow")), found.get(key("offload_optimizer.super_offload"))
    if zenflow is not None and optimizer is None:
        found.add(key("zenflow"), "acts on an optimizer off the device: set offload_optimizer.device")
    if zenflow is not None and early:
        found.add(key("zenflow"), "super_offload says another order of the same update; keep one of them")
    if params is not None and stage < 3:
        found.add(
            _named(found, key("offload_param.device"), key("cpu_offload_param")),
            f"given at stage {stage}, where parameters are whole on every device; allowed: stage 3",
        )
    if params is not None and optimizer is None and dtype == "float32":
        found.add(
            _named(found, key("offload_param.device"), key("cpu_offload_param")),
            "in fp32 a shard is its own master: set offload_optimizer.device, which moves both",
        )
    if optimizer is None and params is None:
        return None
    for name, why in without_effect(zenflow or {}).items():
        found.notices.append(f"{key('zenflow')}.{name} = {zenflow[name]!r} has no effect here: {why}")
    size = found.get(key("sub_group_size"))
    return Offload(
        nvme=_folder(found, key, [optimizer, params]),
        params=_TIERS[params] if params else "device",
        params_in_host=found.get(key("offload_param.max_in_cpu")) if params == "nvme" else None,
        **_of_optimizer(optimizer, found.get(key("offload_optimizer.ratio"))),
        chunk_numel=max(size, _CHUNK_NUMEL[1]) if size < _CHUNK_NUMEL[0] else None,
        queue_depth=found.get("aio.queue_depth") if found.given("aio.queue_depth") else None,
        block_bytes=found.get("aio.block_size") if found.given("aio.block_size") else None,
        update="speculative" if early else None,
        zenflow=None if zenflow is None else fields_of(zenflow),
    )


def _device(found: Findings, section: str, legacy: str) -> str | None:
    """ "cpu", "nvme" or None; the old key counts where the section is not there."""
    given = found.get(f"{section}.device")
    device = None if given in (None, "none") else str(given)
    if found.get(legacy) and device not in (None, "cpu"):
        found.add(legacy, f"says cpu, and {section}.device says {device}; keep one of them")
    return device or ("cpu" if found.get(legacy) else None)


def _named(found: Findings, key: str, legacy: str) -> str:
    return key if found.given(key) else legacy


def _of_optimizer(device: str | None, ratio: float) -> dict[str, str]:
    """Masters and moments, and gradients with them: `ratio` of them leaves, the rest is updated here."""
    if device is None:
        return dict.fromkeys(("grads", "masters", "moments"), "device")
    tier = _TIERS[device]
    split = "device" if ratio == 0 else tier if ratio == 1 else f"{1 - ratio:.9g} device / {ratio:.9g} {tier}"
    return dict.fromkeys(("grads", "masters", "moments"), split)


def _folder(found: Findings, key: Callable[[str], str], devices: list[str | None]) -> str | None:
    names = [key("offload_optimizer.nvme_path"), key("offload_param.nvme_path")]
    paths = {name: found.get(name) for name in names if found.get(name) is not None}
    if "nvme" not in devices:
        return None
    if not paths:
        wanting = names[devices.index("nvme")]
        found.add(wanting, 'needed when the device is "nvme", but not given: a folder on the disk')
        return None
    if len(set(paths.values())) > 1:
        found.add(names[1], f"given {paths[names[1]]!r}, and {names[0]} another folder; give both the same")
    return str(next(iter(paths.values())))
