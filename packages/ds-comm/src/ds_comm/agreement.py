"""Ranks that are about to talk in code say first that they speak the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ds_comm.wire_rows import RowCodec
from ds_core.ground.codec import CastCodec
from ds_core.ground.texts import exchange
from ds_core.ground.wire import Codec, Communicator
from ds_core.state.shard import Json


def settings_of(codec: Codec | None) -> dict[str, Json]:
    """What ranks compare of a codec."""
    if codec is None:
        return {"codec": "none"}
    own: dict[str, Json] = codec.settings() if isinstance(codec, RowCodec) else {}
    dtype: dict[str, Json] = {"dtype": str(codec.dtype)} if isinstance(codec, CastCodec) else {}
    return {"codec": type(codec).__name__, **own, **dtype}


def refuse_disagreement(control: Communicator, settings: Mapping[str, Json], *, what: str) -> None:
    """Raises ValueError, on every rank alike, naming each setting that differs and what each rank has.

    Collective over `control`, which works on the CPU.
    """
    texts = exchange(control, json.dumps(settings, sort_keys=True), about=f"the settings of {what}")
    tables = [json.loads(text) for text in texts]
    faults = []
    for name in sorted({name for table in tables for name in table}):
        ranks: dict[str, list[int]] = {}
        for rank, table in enumerate(tables):
            ranks.setdefault(json.dumps(table.get(name, "nothing")), []).append(rank)
        if len(ranks) > 1:
            said = "; ".join(
                f"{value} on rank {', '.join(map(str, where))}" for value, where in ranks.items()
            )
            faults.append(f"{name} is {said}")
    if faults:
        raise ValueError(
            f"ranks disagree on {what}: {'. '.join(faults)}. Build it from the same values on every rank"
        )
