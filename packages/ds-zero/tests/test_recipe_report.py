"""The recipe's report: plots, tables and files from a record."""

import json
from pathlib import Path

import pytest

from ds_zero.recipes import plot
from ds_zero.recipes.evaluate import compressor_bits
from ds_zero.recipes.plot import smooth, terminal_plot
from ds_zero.recipes.record import Measured, Phase, Record
from ds_zero.recipes.report import Facts, write_report


def a_record() -> Record:
    first = Phase(2, 3, "bfloat16", 4, 1, 0, 60, 30.0, 60_000, heldout_at_save=1.25)
    first.bytes_per_rank["parameters"] = Measured(10_000_128, 10_000_000, "2 x 10,000,000 / 2")
    second = Phase(1, 1, "bfloat16", 4, 2, 60, 100, 20.0, 40_000)
    second.heldout_in_checkpoint, second.heldout_at_load, second.heldout_at_save = 1.25, 1.2500001, 1.1
    return Record([(step, 8.0 - 0.04 * step) for step in range(1, 101)], [first, second])


def facts() -> Facts:
    return Facts("10m on text", 10_000_000, 1000, {"zlib -9": 1.9}, ("def f(", "x):"), {"stage": 3}, 61.0)


def test_record_survives_json() -> None:
    record = a_record()
    assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record


def test_smoothing_is_a_trailing_mean() -> None:
    assert smooth([(0, 4.0), (1, 2.0), (2, 0.0), (3, 0.0)], 2) == [(0, 4.0), (1, 3.0), (2, 1.0), (3, 0.0)]


def test_terminal_plot_shows_the_shape() -> None:
    text = terminal_plot([(x, 10.0 - x) for x in range(11)], width=10, height=5, title="falls")
    rows = text.splitlines()
    assert rows[0].strip() == "falls"
    assert rows[1].startswith("10.00 │")
    assert rows[5].strip().startswith("0.00 │")
    curve = [row.partition("│")[2] for row in rows[1:6]]
    assert curve[0].startswith("\u2880") or curve[0][0] != "\u2800"
    assert curve[4][-1] != "\u2800"
    assert curve[4][0] == curve[0][-1] == "\u2800"
    assert "step 10" in rows[-1]
    assert "(no points)" in terminal_plot([])
    assert len(terminal_plot([(1, 2.0)]).splitlines()) == 14


def test_report_files_hold_what_the_terminal_shows(tmp_path: Path) -> None:
    text = write_report(a_record(), facts(), tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "2 x 10,000,000 / 2" in written
    for part in (
        "stage 3 on 2 rank(s)",
        "better than zlib -9",
        "2 rank(s), stage 3 -> 1 rank(s), stage 1",
        "within the 0.001",
    ):
        assert part in text
        assert part in written
    assert values["bits_per_byte"]["model"] == pytest.approx(1.1 / 0.693147, rel=1e-5)
    assert values["tokens_per_s"] == [2000.0, 2000.0]
    assert values["resume_relative_difference"][0] is None


def test_a_loss_that_changed_by_resuming_is_called_out(tmp_path: Path) -> None:
    record = a_record()
    record.phases[1].heldout_at_load = 1.3
    assert "BEYOND the 0.001" in write_report(record, facts(), tmp_path)


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    record = a_record()
    record.phases[1].heldout_at_save = 2.0
    assert "worse than zlib -9" in write_report(record, facts(), tmp_path)


def test_png_or_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert "pip install matplotlib" in write_report(a_record(), facts(), tmp_path)
    assert not (tmp_path / "loss.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_report(a_record(), facts(), tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_compressors_are_measured_in_bits_per_byte() -> None:
    packed = compressor_bits(b"abcdefgh" * 1000)
    assert list(packed) == ["zlib -9", "lzma -9e"]
    assert all(0 < value < 1 for value in packed.values())
