"""The search, the advice, and the note on an error when memory has run out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ds_core import Engine, ReplicatedOwner, ShardedOptimizer
from ds_core.cli.main import main
from ds_core.setup.estimate import DoesNotFit
from ds_core.setup.predict import Settings, activation_bytes, predict
from ds_core.setup.search import Speed, search, step_seconds, wire_bytes
from ds_core.setup.shape import Dims, Shape
from ds_core.testing.models import CASES
from ds_core.train.memory import Memory, advice, is_oom, oom_note

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1536,
    "vocab_size": 4096,
}
SHAPE = Shape.from_config(CONFIG)
SETTINGS = Settings(ranks=4, seq=256)


def test_activations_by_hand() -> None:
    dims = Dims(layers=2, hidden=8, heads=2, vocab=10, intermediate=16, kv_heads=1, head_dim=4)
    s = Settings(dtype="bfloat16", micro_batch=3, seq=5)
    attention, mlp = 2 * (2 * 2 + 2 * 1) * 4, 2 * 4 * 16
    block = 2 * 8 * (4 + 2 + 2) + attention + mlp
    rest = 8 * (4 + 2 + 2) + 10 * (2 + 12)
    assert activation_bytes(dims, s) == 15 * (2 * block + rest)
    assert activation_bytes(dims, replace(s, recompute=True)) == 15 * (2 * 8 * 2 + block + rest)
    eager = activation_bytes(dims, replace(s, attention="eager"))
    assert eager == 15 * (2 * (block + 2 * 5 * 6) + rest)
    experts = replace(dims, experts=4, experts_per_token=2, qk_norm=True)
    assert activation_bytes(experts, s) == 15 * (
        2 * (block + mlp + 2 * 2 * 2 * 8 + (2 + 1) * 4 * (4 + 2)) + rest
    )
    layer_norm = replace(dims, rms_norm=False, mlp_saves=2)
    block = 2 * 8 * (2 + 2) + attention + mlp // 2
    assert activation_bytes(layer_norm, s) == 15 * (2 * block + 8 * (2 + 2) + 10 * (2 + 12))


def test_loading_by_hand() -> None:
    """One unit of 20 elements in 24: as built, flat, in bf16 and cut."""
    shape = Shape.of(nn.Linear(3, 5))
    s = Settings(ranks=3, stage=3, dtype="bfloat16")
    assert predict(shape, s).loading == 4 * 20 + 4 * 24 + 2 * 24 + 2 * 8
    assert predict(shape, replace(s, on_meta=False)).loading == 4 * 20 + 4 * 24 + 2 * 24 + 2 * 8
    assert predict(shape, s).host == (4 + 8) * 8  # a checkpoint's staging: master and two states
    assert predict(shape, replace(s, on_meta=False, ranks=1)).host == (4 + 8) * 24 - 8 * 4
    two = Shape.of(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), bucket_numel=1)
    on_meta = predict(two, replace(s, dtype="float32", stage=1))
    assert on_meta.loading == 4 * 24 + 4 * 18 + 4 * 24  # the first is cut, the second fresh and flat
    whole = predict(two, replace(s, dtype="float32", stage=1, on_meta=False))
    assert whole.loading == 4 * 18 + 4 * 24 + 4 * 24  # the second still as built, and flat


def test_the_search_takes_the_cheapest_that_fits_and_says_why_the_others_lost() -> None:
    plenty = search(SHAPE, SETTINGS, global_batch=32, available=100e9)
    best = plenty[0]
    assert (best.verdict, best.settings.recompute, best.settings.accumulate) == ("chosen", False, 1)
    assert best.settings.stage in (0, 1)
    assert len(plenty) == 4 * 2 * 4  # stages, recompute, micro batches of 1, 2, 4, 8
    assert all(one.verdict for one in plenty)
    verdicts = {one.name: one.verdict for one in plenty}
    assert verdicts["stage 3, micro batch 8, accumulate 1"].startswith("sends ")
    assert verdicts[f"{best.name}, recompute"] == "sends the same, 1.33 x the time: recomputes" or (
        "recomputes" in verdicts[f"{best.name}, recompute"]
    )
    tight = search(SHAPE, SETTINGS, global_batch=32, available=best.memory.peak - 1)
    assert tight[0].memory.peak < best.memory.peak
    assert f"does not fit: {tight[-1].memory.peak / 1e6:.1f} MB, of which " in tight[-1].verdict
    for one in tight[1:]:
        fits = one.memory.peak <= best.memory.peak - 1
        assert fits != one.verdict.startswith("does not fit")
    least = min(one.memory.peak for one in plenty)
    assert search(SHAPE, SETTINGS, global_batch=32, available=least)[0].memory.peak == least


def test_when_nothing_fits_the_smallest_is_shown_with_what_to_change() -> None:
    with pytest.raises(DoesNotFit) as caught:
        search(SHAPE, SETTINGS, global_batch=32, available=1e6)
    text = str(caught.value)
    assert text.startswith("nothing fits 1.0 MB per rank; the smallest is stage ")
    assert "  1. " in text
    with pytest.raises(ValueError, match="30 does not divide over 4 ranks"):
        search(SHAPE, SETTINGS, global_batch=30, available=1e9)


def test_the_cost_model_by_hand() -> None:
    speed = Speed(flops_per_s=1.0, wire_bytes_per_s=1e30, block_start_s=0.0)
    s = Settings(ranks=2, seq=4, micro_batch=2, accumulate=3)
    active = SHAPE.numel - 4096 * 512
    attention = 4 * 8 * 512 * 4
    assert step_seconds(SHAPE, s, speed) == 24 * 3 * (2 * active + attention)
    assert step_seconds(SHAPE, replace(s, recompute=True), speed) == 24 * 4 * (2 * active + attention)
    psi = sum(unit.padded(2) for unit in SHAPE.units)
    assert [wire_bytes(SHAPE, replace(s, stage=stage)) for stage in (0, 1, 2)] == [2 * psi, 2 * psi, 4 * psi]
    assert wire_bytes(SHAPE, replace(s, ranks=1, stage=3)) == 0


def test_advice_is_the_cheapest_first_and_what_suffices_before() -> None:
    memory = Memory(params=100, grads=100, optimizer=600, buckets=10, gathered=0, activations=500)
    changes = advice(memory, ranks=4, stage=0)
    assert [change.what for change in changes] == [
        "stage 2",
        "half the micro batch, accumulate=2",
        "recompute activations",
    ]
    assert [change.saves for change in changes] == [525, 250, 450]
    needy = advice(memory, ranks=4, stage=0, missing=520)
    assert [change.what for change in needy] == ["stage 2", "stage 3", "half the micro batch, accumulate=2"]
    assert needy[1].saves == 600
    assert str(needy[1]) == "stage 3: saves about 600 B (1.5 x the bytes on the wire)"
    cut = advice(memory, ranks=4, stage=3, low=True, recompute=True, single=True)
    assert [(change.what, change.saves) for change in cut] == [("8 ranks", 400)]
    wide = advice(memory, ranks=4, stage=3, low=False, recompute=True, single=True)
    assert wide[0].what == 'dtype="bfloat16"'
    assert "results change" in str(wide[0])
    assert advice(Memory(0, 0, 0, 0, 0, 0), ranks=1, stage=0) == []


class Hungry(nn.Module):
    """Asks for more memory than there is, in the forward or in the backward."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.inner = CASES["mlp"].build()
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward":
            torch.empty(1 << 55)
        out: Tensor = self.inner(x)
        if self.when == "backward":
            out.register_hook(lambda grad: torch.empty(1 << 55))
        return out


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_keeps_its_error_and_gets_a_note(when: str) -> None:
    model = Hungry(when)
    optimizer = torch.optim.AdamW(model.parameters())
    owner = ReplicatedOwner(model)
    engine = Engine(model, owner, ShardedOptimizer(optimizer, owner))
    batch = CASES["mlp"].make_batch(0, 1)
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        engine.train_batch([batch], lambda model, batch: CASES["mlp"].losses(model, batch)[0])
    (note,) = caught.value.__notes__
    assert note.startswith("memory of rank 0 at stage 0: params ")
    assert "  1. " in note
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        engine.backward(engine(batch["x"]).sum())


def test_other_errors_get_no_note() -> None:
    assert is_oom(MemoryError())
    assert is_oom(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_oom(RuntimeError("shapes do not match"))


def test_the_note_counts_live_storages() -> None:
    model = CASES["mlp"].build()
    numel = sum(p.numel() for p in model.parameters())
    owner = ReplicatedOwner(model)
    note = oom_note(owner, ShardedOptimizer(torch.optim.AdamW(model.parameters()), owner), 1)
    assert f"params {4 * owner.units[0].layout.numel / 1e3:.1f} kB" in note
    assert owner.units[0].layout.numel - numel < 8


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_estimate_of_a_model(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "--model", config, "--ranks", "4", "--seq", "256"]
    assert main([*words, "--memory-gb", "0.5"]) == 0
    text = capsys.readouterr().out
    assert f"{SHAPE.numel:,} parameters, bf16, adamw, 4 ranks: bytes per rank" in text
    for name in ("buckets", "gathered", "activations", "loading", "host"):
        assert name in text
    assert main([*words, "--stage", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    expected = predict(SHAPE, replace(SETTINGS, stage=2))
    assert made["stages"][0]["total"] == expected.total
    assert main([*words, "--memory-gb", "0.001"]) == 1
    assert main(["estimate", "--model", config]) == 0
    assert "without activations (give --seq)" in capsys.readouterr().out


def test_estimate_searches(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "--model", config, "--ranks", "4", "--search", "--memory-gb", "1"]
    assert main([*words, "--seq", "256", "--global-batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "chosen" in out
    assert "recomputes" in out
    assert main([*words, "--seq", "256", "--global-batch", "8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["candidates"][0]["verdict"] == "chosen"
    assert main([*words, "--global-batch", "8"]) == 2
    assert "--search needs --seq" in capsys.readouterr().err
    tight = [*words[:-1], "0.001", "--seq", "256", "--global-batch", "8"]
    assert main(tight) == 2
    assert "nothing fits 1.0 MB per rank" in capsys.readouterr().err
    assert main(["estimate", "--params", "1K", "--search"]) == 2
    assert "give --model" in capsys.readouterr().err
