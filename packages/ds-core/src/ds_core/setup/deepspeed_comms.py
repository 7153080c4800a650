"""The `comms_logger` section of a DeepSpeed file, as what ds_comm's CommLog is told (pure)."""

from __future__ import annotations

from typing import Any

from ds_core.setup.findings import Findings
from ds_core.setup.plan import CommsLogging


def plan_comms(found: Findings) -> CommsLogging | None:
    """None where it is off. Notes a problem where nothing would be logged."""

    def get(name: str) -> Any:
        return found.get(f"comms_logger.{name}")

    if not get("enabled"):
        return None
    if not get("prof_all") and not get("prof_ops"):
        found.add("comms_logger.prof_ops", "prof_all is false and no op is named: nothing would be logged")
    ops = None if get("prof_all") else tuple(dict.fromkeys(get("prof_ops")))
    return CommsLogging(ops=ops, verbose=get("verbose"), debug=get("debug"))
