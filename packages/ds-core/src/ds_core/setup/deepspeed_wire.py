"""What a DeepSpeed file says about compressed communication (ZeRO++, LoCo): its keys as one `Wire` (pure)."""

from __future__ import annotations

from typing import Any

from ds_core.setup import plugins
from ds_core.setup.deepspeed_loco import arguments_of
from ds_core.setup.findings import Findings
from ds_core.setup.plan import Wire


def plan_wire(found: Findings, stage: int, *, skips: bool) -> Wire | None:
    """What travels quantised, or None when nothing does. Problems are noted.

    `skips`: steps with gradients that are not finite are skipped, so these must arrive.
    """

    def key(name: str) -> str:
        return f"zero_optimization.{name}"

    weights, gradients = found.get(key("zero_quantized_weights")), found.get(key("zero_quantized_gradients"))
    loco = found.get(key("zeropp_loco_param"))
    if weights and stage < 3:
        found.add(key("zero_quantized_weights"), f"given true, which has no effect at stage {stage}")
    if loco is not None and not gradients:
        found.add(
            key("zeropp_loco_param"), "feeds back what quantising loses: set zero_quantized_gradients to true"
        )
    if loco is not None and skips:
        found.notices.append(
            f"{key('zeropp_loco_param')}: errors are in units of the scaled loss; where its scale changes, "
            "what is fed back once is off by that factor"
        )
    if not weights and not gradients:
        return None
    arguments = None if loco is None else arguments_of(loco)
    return Wire(weights=weights, gradients=gradients, loco=arguments, marks=skips)


def build_routes(wire: Wire) -> dict[str, Any]:
    """`gather=` and `reduce=` of an owner. Raises LookupError naming ds-comm when it is not installed."""
    routes: dict[str, Any] = {}
    if wire.weights:
        codec = plugins.resolve("codec", "int8")
        routes["gather"] = plugins.look_up("route", "quantized_weights")(codec)
    if wire.gradients:
        policy = "mark" if wire.marks else "raise"
        hops = [plugins.resolve("codec", {"type": "int4", "nonfinite": policy}) for _ in range(2)]
        routes["reduce"] = plugins.look_up("route", "two_hop")(*hops)
        if wire.loco is not None:
            routes["reduce"] = plugins.look_up("route", "loco")(routes["reduce"], **wire.loco)
    return routes
