"""What a profile found: costs by module and phase, as a table and as JSON (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["forward", "backward", "recompute"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute")


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one phase. `flops`: two for each multiply-accumulate; `elementwise` operations stand apart.

    `seconds`: inside the operators that did it, so without Python's time between them.
    """

    flops: int = 0
    elementwise: int = 0
    calls: int = 0
    seconds: float = 0.0

    @property
    def macs(self) -> int:
        return self.flops // 2

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.elementwise + other.elementwise,
            self.calls + other.calls,
            self.seconds + other.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "macs": self.macs,
            "flops": self.flops,
            "elementwise": self.elementwise,
            "operator_calls": self.calls,
            "seconds": round(self.seconds, 9),
        }


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """One module with all that is below it or runs inside its forward. `params`: logical elements, once each.

    `runs`: how often its forward ran, `reruns`: how often a checkpoint ran it again.
    """

    name: str
    kind: str
    params: int
    runs: int
    reruns: int
    forward: Cost
    backward: Cost
    recompute: Cost

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops + self.recompute.flops

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds + self.recompute.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "params": self.params,
            "runs": self.runs,
            "reruns": self.reruns,
            **{str(phase): getattr(self, phase).to_json() for phase in PHASES},
        }


@dataclass(frozen=True, slots=True)
class FlopReport:
    """A profile. `modules`: the model first, then its modules in definition order; `outside`: what belongs to
    no module, such as the loss and the optimizer. `operators`: the model's costs by phase and operator.
    """

    modules: tuple[ModuleCost, ...]
    outside: Mapping[Phase, Cost]
    operators: Mapping[Phase, Mapping[str, Cost]]

    @property
    def model(self) -> ModuleCost:
        return self.modules[0]

    @property
    def params(self) -> int:
        return self.model.params

    @property
    def macs(self) -> int:
        """Of one forward of everything that ran."""
        return self.model.forward.macs

    @property
    def flops(self) -> int:
        """Of the forward: 2 * macs. The backward's and the recomputation's are in `model`."""
        return self.model.forward.flops

    def __getitem__(self, name: str) -> ModuleCost:
        """A module by its full name; the model is "". Raises LookupError for a stranger."""
        for module in self.modules:
            if module.name == name:
                return module
        raise LookupError(f"no module {name!r} in this profile; there is {_some(self.modules)}")

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "modules": [module.to_json() for module in self.modules],
            "outside": {phase: cost.to_json() for phase, cost in self.outside.items()},
            "operators": {
                phase: {name: cost.to_json() for name, cost in costs.items()}
                for phase, costs in self.operators.items()
            },
        }

    def table(self, depth: int | None = None) -> str:
        """Plain text: one line per module down to `depth` names, and the share of the model's FLOPs."""
        lines = [
            ["module", "params", "MACs", "forward", "backward", "recompute", "elementwise", "ms", "share"]
        ]
        for module in self.modules:
            level = module.name.count(".") + 1 if module.name else 0
            if depth is not None and level > depth:
                continue
            if not (module.params or module.runs or module.flops):
                continue
            label = f"{'  ' * level}{module.name.rpartition('.')[2] or '(model)'} ({module.kind})"
            costs = [getattr(module, phase) for phase in PHASES]
            lines.append(
                [
                    label + (f" x{module.runs}" if module.runs > 1 else ""),
                    *map(short, (module.params, module.forward.macs, *(cost.flops for cost in costs))),
                    short(sum(cost.elementwise for cost in costs)),
                    f"{module.seconds * 1e3:.2f}",
                    f"{module.flops / self.model.flops:.1%}" if self.model.flops else "",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        rate = self.model.flops / self.model.seconds / 1e12 if self.model.seconds else 0.0
        text.append(f"{rate:.3f} TFLOPS inside operators; FLOPs are two per multiply-accumulate")
        return "\n".join(text)


def short(number: float) -> str:
    """1234567 -> "1.235 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return f"{number:g}"


def _some(modules: Sequence[ModuleCost]) -> str:
    names = [repr(module.name) for module in modules]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
