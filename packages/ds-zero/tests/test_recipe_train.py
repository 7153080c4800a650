"""The main job end to end on tiny text: two phases, resume, tables, and errors that harm nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_core import Accelerator
from ds_core.testing.distributed import distributed, run_ranks
from ds_zero.recipes import train_gpt
from ds_zero.recipes.build import Split, split_batch
from ds_zero.recipes.pace import SETTLE_AFTER, Pace
from ds_zero.recipes.ranks import Ranks
from ds_zero.recipes.train_gpt import main

SMALL = ["--model-size", "100k", "--tokenizer", "bytes", "--seq", "32", "--eval-bytes", "600"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait by spinning make these small models ten times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for number in range(30):
        (root / f"{number}.txt").write_text(f"{number} " * 40 + "the same words again and again\n" * 8)
    return root


def run(text: Path, out: Path, *more: str, steps: int = 6) -> dict[str, object]:
    argv = [*SMALL, "--data", str(text), "--steps", str(steps), "--dtype", "float32", *more]
    assert main([*argv, "--out", str(out)] if "--resume" not in more else argv) == 0
    found: dict[str, object] = json.loads((out / "report.json").read_text())
    return found


@distributed(world_size=2)
def test_two_ranks_become_one(rank: int, text: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--data", str(text), "--steps", "8", "--batch", "1", "--dtype", "float32"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    if rank != 0:
        return
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["phases"]
    assert (first["ranks"], first["stage"], first["accumulate"]) == (2, 3, 1)
    assert (second["ranks"], second["stage"], second["accumulate"]) == (1, 1, 2)
    assert (first["last_step"], second["first_step"], second["last_step"]) == (5, 5, 8)
    assert report["resume_relative_difference"][1] <= 1e-6
    assert [step for step, _ in report["losses"]] == list(range(1, 9))
    assert report["losses"][-1][1] < report["losses"][0][1]
    for phase in (first, second):
        for name, cell in phase["bytes_per_rank"].items():
            # Beside the formula: a `step` scalar for each piece, and padding of a few elements.
            assert cell["formula"] <= cell["measured"] <= 1.001 * cell["formula"], (phase["stage"], name)
    assert first["sent_per_step"]["all collectives"]["measured"] > 0


def test_one_rank_becomes_two(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path, "--batch", "4", "--stop-after", "3")
    run_ranks(resume_on_two, 2, directory=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["phases"]
    assert (first["ranks"], first["batch"], first["accumulate"]) == (1, 4, 1)
    assert (second["ranks"], second["batch"], second["accumulate"]) == (2, 1, 2)
    assert report["resume_relative_difference"][1] <= 1e-6


def test_resuming_cannot_change_the_global_batch(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(text, tmp_path, "--batch", "2", "--stop-after", "1")
    assert main(["--resume", str(tmp_path), "--batch", "1", "--accumulate", "4"]) == 2
    assert "is a global batch of 4" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path), "--batch", "1", "--stop-after", "2"]) == 0
    assert main(["--resume", str(tmp_path), "--stop-after", "2"]) == 2
    assert "the run has done 2 steps already" in capsys.readouterr().err


def test_stop_before_the_length_is_chosen(text: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--data", str(text), "--out", str(tmp_path), "--stop-after", "2"]
    assert main(argv) == 0
    assert [step for step, _ in json.loads((tmp_path / "report.json").read_text())["losses"]] == [1, 2]


def resume_on_two(rank: int, directory: Path) -> None:
    assert main(["--resume", str(directory), "--batch", "1", "--stage", "2"]) == 0


def test_a_deepspeed_file_in_place_of_flags(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ds_config.json"
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 3e-3}},
        "gradient_clipping": 1.0,
    }
    file.write_text(json.dumps(config))
    argv = [*SMALL, "--data", str(text), "--steps", "8", "--config", str(file), "--out"]
    assert main([*argv, str(tmp_path / "run"), "--stop-after", "4"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--stage", "3", "--batch", "1"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    layout = [(p["stage"], p["dtype"], p["batch"], p["accumulate"]) for p in report["phases"]]
    assert layout == [(2, "bfloat16", 2, 2), (3, "bfloat16", 1, 4)]
    assert report["resume_relative_difference"][1] <= 1e-5
    assert report["losses"][-1][1] < report["losses"][0][1]
    file.write_text(json.dumps(config | {"zero_optimisation": {}}))
    assert main([*argv, str(tmp_path / "again")]) == 2
    assert "zero_optimisation: unknown key" in capsys.readouterr().err


def test_stopped_and_resumed_equals_uninterrupted(text: Path, tmp_path: Path) -> None:
    whole = run(text, tmp_path / "whole", "--switch-at", "0")
    run(text, tmp_path / "cut", "--switch-at", "0", "--stop-after", "3")
    cut = run(text, tmp_path / "cut", "--resume", str(tmp_path / "cut"))
    assert cut["losses"] == whole["losses"]
    assert cut["resume_relative_difference"] == [None, 0.0]


@pytest.mark.parametrize("stage", ["0", "2"])
def test_resume_at_another_stage(text: Path, tmp_path: Path, stage: str) -> None:
    run(text, tmp_path, "--stop-after", "2", "--stage", "3", steps=4)
    report = run(text, tmp_path, "--resume", str(tmp_path), "--stage", stage, steps=4)
    assert [phase["stage"] for phase in report["phases"]] == [3, int(stage)]
    assert report["resume_relative_difference"][1] <= 1e-6


def test_one_process_switches_its_stage(text: Path, tmp_path: Path) -> None:
    report = run(text, tmp_path, "--checkpoint-activations", "--tied", "--accumulate", "2")
    assert [(p["ranks"], p["stage"]) for p in report["phases"]] == [(1, 3), (1, 1)]
    assert (tmp_path / "report.md").read_text().startswith("# train_gpt")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_with_masters(text: Path, tmp_path: Path, dtype: str) -> None:
    report = run(text, tmp_path, "--dtype", dtype, "--optimizer", "torch-adamw", "--save-every", "2")
    assert report["losses"][-1][1] < report["losses"][0][1]
    assert report["phases"][0]["bytes_per_rank"]["optimizer state"]["how"].startswith("12 x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "4"], "--stage 4: ZeRO has stages 1"),
        (["--model-size", "7b", "--batch", "1"], "7b: (?s:.*)does not fit(?s:.*)nothing was"),
        (["--switch-ranks", "3"], "--switch-ranks 3 is more than the 1 rank"),
        (["--seq", "20000", "--batch", "1"], "the training text is .* tokens, one window needs 20001"),
        (["--steps", "2", "--batch", "500"], "do not fill one global batch of 500"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main([*SMALL, "--data", str(text), "--out", str(tmp_path / "run"), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train_gpt: error: ")
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--data", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    assert "no text in" in capsys.readouterr().err


def test_nan_names_the_step_and_leaves_the_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(text, tmp_path, "--stop-after", "3", "--switch-at", "0")
    before = sorted(p.name for p in (tmp_path / "checkpoints").rglob("*"))
    poison = tmp_path / "checkpoints"
    assert poison.is_dir()
    argv = [*SMALL, "--data", str(text), "--steps", "6", "--dtype", "float32", "--resume", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.PhaseRunner, "_load", _load_then_poison)
        assert main(argv) == 2
    assert re.search(r"step 4: .*not finite.*first module: ", capsys.readouterr().err)
    assert sorted(p.name for p in (tmp_path / "checkpoints").rglob("*")) == before
    assert main(argv) == 0


_load = train_gpt.PhaseRunner._load


def _load_then_poison(self: train_gpt.PhaseRunner) -> float | None:
    _load(self)
    unit = self.job.owner.units[0]
    unit.master().tensor.fill_(float("nan"))
    unit.local.fill_(float("nan"))
    return None


def test_a_damaged_checkpoint_is_refused_and_kept(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(text, tmp_path, "--stop-after", "2", "--keep", "1", steps=4)
    shard = max((tmp_path / "checkpoints").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    healthy = shard.read_bytes()
    shard.write_bytes(healthy[:-1] + bytes([healthy[-1] ^ 1]))
    assert main(["--resume", str(tmp_path)]) == 2
    assert shard.name in capsys.readouterr().err
    shard.write_bytes(healthy)
    assert main(["--resume", str(tmp_path)]) == 0


def test_global_batch_is_kept_or_the_equation_shown() -> None:
    assert Split(4, 1, 2).over(1) == Split(4, 2, 1)
    assert split_batch(24, 2, 3) == Split(2, 4, 3)
    with pytest.raises(ValueError, match=r"global batch 8 = batch 4 x accumulate x 3 ranks has no whole"):
        split_batch(8, 4, 3)


def test_pace_chooses_the_length_within_the_warmup() -> None:
    pace, ranks = Pace(None, None, minutes=1.0), Ranks(Accelerator(torch.device("cpu")))
    settled = [pace.observe(step + 1, 0.5, ranks) for step in range(SETTLE_AFTER + 1)]
    assert settled == [False] * (SETTLE_AFTER - 1) + [True, False]
    assert pace.total == 120
    assert SETTLE_AFTER < pace.warmup == 30
    factors = [pace.factor(step) for step in range(120)]
    assert factors[:30] == sorted(factors[:30])
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.05, abs=0.01)


def test_a_slower_phase_shortens_the_run() -> None:
    pace, ranks = Pace(None, None, minutes=1.0), Ranks(Accelerator(torch.device("cpu")))
    for step in range(1, 73):
        pace.observe(step, 0.5, ranks)
    pace.new_phase()
    for step in range(73, 73 + SETTLE_AFTER):
        pace.observe(step, 1.0, ranks)
    assert pace.total == 60 - 36 + 72
    fixed = Pace(120, None, minutes=1.0)
    assert not any(fixed.observe(step, 9.0, ranks) for step in range(1, 20))
    assert fixed.total == 120


@distributed(world_size=4)
def test_four_ranks_regroup_as_two(rank: int) -> None:
    ranks = Ranks.join(Accelerator.current())
    assert ranks.sum(1.0, float(rank)) == [4.0, 6.0]
    assert ranks.share(lambda: torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError if rank == 0 else ValueError):
        ranks.share(lambda: {}["nothing"])
    if ranks.regroup(2):
        assert ranks.sum(1.0, float(rank)) == [2.0, 1.0]
    else:
        assert rank >= 2
