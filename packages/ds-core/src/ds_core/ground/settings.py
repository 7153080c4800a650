"""One effective setting of a run: its value, where it came from, where it acts, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Where = Literal["default", "file", "cli", "code", "derived"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from, in words a user recognises: "file ds.json", "command line --stage"."""

    kind: Where
    detail: str = ""

    def __str__(self) -> str:
        name = "command line" if self.kind == "cli" else self.kind
        joint = ": " if self.kind == "derived" else " "
        return f"{name}{joint}{self.detail}" if self.detail else name


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of `explain`. `acts`: where it has its effect, or why it has none."""

    key: str
    value: Any
    source: Origin
    acts: str
    active: bool = True


class Settings(tuple[Setting, ...]):
    """All settings of a run; as text, a table."""

    __slots__ = ()

    def __new__(cls, settings: Iterable[Setting]) -> Settings:
        return super().__new__(cls, settings)

    def __str__(self) -> str:
        head = ("setting", "value", "source", "active", "where it acts")
        rows = [
            head,
            *((s.key, repr(s.value), str(s.source), "yes" if s.active else "no", s.acts) for s in self),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)
