"""The report at the end of a run: terminal, report.md, report.json and loss.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_zero.recipes.evaluate import bits
from ds_zero.recipes.plot import png_plot, smooth, terminal_plot
from ds_zero.recipes.progress import format_seconds
from ds_zero.recipes.record import Measured, Phase, Record

# Loading restores the bits of every weight; what may differ is the order of a sum (threads, batch owners).
SAME_LOSS = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the report states beside the record."""

    job: str  # one line: model, data, tokenizer
    num_parameters: int
    heldout_bytes: int
    compressors: Mapping[str, float]  # name -> bits per byte of the held-out text
    sample: tuple[str, str]  # (prompt, continuation)
    settings: Mapping[str, Any]
    seconds: float
    notes: Sequence[str] = ()


def write_report(record: Record, facts: Facts, directory: Path) -> str:
    """Write report.md, report.json and loss.png into `directory`; returns the text for the terminal."""
    why_not = "no steps, no picture"
    if record.losses:
        why_not = png_plot(record.losses, _marks(record.phases), directory / "loss.png") or ""
    notes = [*facts.notes, *([why_not] if why_not else [])]
    picture = "" if why_not else "\n![loss](loss.png)\n"
    text = f"# train_gpt\n\n{_body(record, facts, notes, formulas=True)}\n{picture}"
    (directory / "report.md").write_text(text, encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(_as_json(record, facts), indent=1), encoding="utf-8")
    return _body(record, facts, notes, formulas=False) + f"\n\nmore in {directory / 'report.md'}"


def _body(record: Record, facts: Facts, notes: Sequence[str], *, formulas: bool) -> str:
    """All sections; with `formulas` the tables say what the formulas were, too wide for most terminals."""
    curve = terminal_plot(smooth(record.losses, 5), title="loss, nats per token")
    sections = [
        ("Run", "\n".join(f"- {line}" for line in _run_lines(record, facts))),
        ("Loss", f"```\n{curve}\n```"),
        ("Held-out text", _heldout(record, facts)),
        ("Resume", _resume(record)),
        ("Bytes per rank", _cells(record.phases, "bytes_per_rank", formulas)),
        ("Bytes sent per rank and step", _cells(record.phases, "sent_per_step", formulas)),
        ("Sample", f"```\n{facts.sample[0]}⟶{facts.sample[1]}\n```"),
    ]
    if notes:
        sections.append(("Notes", "\n".join(f"- {note}" for note in notes)))
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)


def resume_difference(phase: Phase) -> float | None:
    """Relative difference between the held-out loss in the checkpoint and after loading it."""
    if phase.heldout_in_checkpoint is None or phase.heldout_at_load is None:
        return None
    return abs(phase.heldout_at_load - phase.heldout_in_checkpoint) / phase.heldout_in_checkpoint


def _marks(phases: Sequence[Phase]) -> list[tuple[float, str]]:
    return [(p.first_step, f"resumed: {p.ranks} rank(s), stage {p.stage}") for p in phases[1:]]


def _run_lines(record: Record, facts: Facts) -> list[str]:
    lines = [
        facts.job,
        f"{facts.num_parameters:,} parameters; {format_seconds(facts.seconds)} min in all",
    ]
    for p in record.phases:
        lines.append(
            f"steps {p.first_step + 1}-{p.last_step}: stage {p.stage} on {p.ranks} rank(s), {p.dtype}, "
            f"batch {p.batch} x {p.accumulate} per rank, {p.tokens_per_s:,.0f} tokens/s"
        )
    return lines


def _heldout(record: Record, facts: Facts) -> str:
    rows = [(f"{name}", f"{value:.3f}") for name, value in facts.compressors.items()]
    final = _final_bits(record)
    verdict = ""
    if final is not None:
        rows.append(("this model", f"{final:.3f}"))
        zlib_name, zlib_bits = next(iter(facts.compressors.items()))
        verdict = "\n\nThe model predicts this text " + (
            f"better than {zlib_name} packs it." if final < zlib_bits else f"worse than {zlib_name} packs it."
        )
    intro = f"{facts.heldout_bytes:,} bytes of files that were not trained on, bits per byte:\n\n"
    return intro + _table(("", "bits per byte"), rows) + verdict


def _final_bits(record: Record) -> float | None:
    values = [p.heldout_at_save for p in record.phases if p.heldout_at_save is not None]
    return bits(values[-1]) if values else None


def _resume(record: Record) -> str:
    lines = []
    for before, after in zip(record.phases, record.phases[1:], strict=False):
        difference = resume_difference(after)
        if difference is None or after.heldout_in_checkpoint is None or after.heldout_at_load is None:
            continue
        bound = SAME_LOSS.get(after.dtype, SAME_LOSS["bfloat16"])
        verdict = "within" if difference <= bound else "BEYOND"
        lines.append(
            f"{before.ranks} rank(s), stage {before.stage} -> {after.ranks} rank(s), stage {after.stage} "
            f"at step {after.first_step}: held-out bits per byte {bits(after.heldout_in_checkpoint):.6f} "
            f"before saving, {bits(after.heldout_at_load):.6f} after loading (relative difference "
            f"{difference:.1e}, {verdict} the {bound:g} that summation order explains)"
        )
    return "\n".join(lines) or "This run was not resumed."


def _cells(phases: Sequence[Phase], which: str, formulas: bool) -> str:
    head = ["stage", "ranks", "of", "measured", "formula", "ratio", *(["how"] if formulas else [])]
    rows: list[list[str]] = []
    for p in phases:
        cells: Mapping[str, Measured] = getattr(p, which)
        for name, cell in cells.items():
            ratio = f"{cell.measured / cell.formula:.3f}" if cell.formula else "-"
            row = [str(p.stage), str(p.ranks), name, f"{cell.measured:,.0f}", f"{cell.formula:,.0f}", ratio]
            rows.append([*row, cell.how] if formulas else row)
    return _table(head, rows) if rows else "Not measured in this run."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _as_json(record: Record, facts: Facts) -> dict[str, Any]:
    return {
        **record.as_json(),
        "job": facts.job,
        "parameters": facts.num_parameters,
        "seconds": facts.seconds,
        "heldout_bytes": facts.heldout_bytes,
        "bits_per_byte": {**facts.compressors, "model": _final_bits(record)},
        "tokens_per_s": [p.tokens_per_s for p in record.phases],
        "resume_relative_difference": [resume_difference(p) for p in record.phases],
        "sample": {"prompt": facts.sample[0], "continuation": facts.sample[1]},
        "settings": dict(facts.settings),
        "notes": list(facts.notes),
    }
