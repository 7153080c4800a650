"""Every knob of the recipe: the flags, their defaults, and which of them contradict each other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ds_zero.recipes.model import SIZES

MAX_AUTO_STEPS = 1500
RUN_FILE = "run.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "torch-adamw", "sgd")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags say. None means that the recipe chooses, or that the feature is off."""

    stage: int = 3
    dtype: str = "auto"
    optimizer: str = "adamw"
    config: Path | None = None
    checkpoint_activations: bool = False
    device: str | None = None
    model_size: str = "10m"
    tied: bool = False
    steps: int | None = None
    minutes: float = 3.5
    batch: int = 4
    accumulate: int = 1
    seq: int = 256
    lr: float = 1.4e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    data: Path | None = None
    tokenizer: str = "bpe"
    vocab: int = 4096
    eval_bytes: int = 128 * 1024
    out: Path | None = None
    save_every: int | None = None
    keep: int | None = 2
    resume: Path | None = None
    stop_after: int | None = None
    switch_at: float = 0.6
    switch_stage: int | None = None
    switch_ranks: int | None = None
    plain: bool = False

    def as_json(self) -> dict[str, Any]:
        """JSON values, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


# What a checkpoint's tensors, data order and schedule depend on: a resumed run cannot change these.
FIXED = (
    *("model_size", "tied", "seq", "data", "tokenizer", "vocab", "eval_bytes", "seed"),
    *("optimizer", "lr", "warmup", "weight_decay"),
)
# flag -> the key of a DeepSpeed file that says the same
IN_CONFIG = {
    "stage": "zero_optimization.stage",
    "dtype": "bf16.enabled or fp16.enabled",
    "optimizer": "optimizer.type",
    "batch": "train_micro_batch_size_per_gpu",
    "accumulate": "gradient_accumulation_steps",
    "lr": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "warmup": "scheduler.params.warmup_num_steps",
    "clip": "gradient_clipping",
}

_EPILOG = """\
examples:
  ds launch --nproc 2 -m ds_zero.recipes.train_gpt                     the main job
  python -m ds_zero.recipes.train_gpt --steps 200 --model-size 2m      one process, a smaller model
  ds launch --nproc 4 -m ds_zero.recipes.train_gpt --data ~/notes      your own text
  python -m ds_zero.recipes.train_gpt --resume runs/NAME --stage 2     go on with an earlier run
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Flags that were not typed are absent from the parsed namespace."""
    parser = _Parser(
        "train_gpt",
        description="Train a GPT with ZeRO on local text; stop and resume at another world size and stage.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_training_flags(parser)
    _add_data_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--stage", type=int, help="ZeRO stage: 1, 2, 3, or 0 to replicate everything [3]")
    add("--model-size", metavar="NAME", help=f"{', '.join(SIZES)} [{default.model_size}]")
    add("--tied", action="store_true", help="let the output head share the embedding's weight")
    add(
        "--dtype",
        metavar="NAME",
        help=f"{', '.join(DTYPES)}; bfloat16 and float16 keep fp32 masters; auto takes bfloat16 where it is "
        "faster [auto]",
    )
    add("--steps", type=int, help="optimizer steps in all [as many as fit into --minutes]")
    add("--minutes", type=float, help=f"training time to fill when --steps is absent [{default.minutes:g}]")
    add("--batch", type=int, help=f"sequences per rank and micro batch [{default.batch}]")
    add("--accumulate", type=int, help=f"micro batches per optimizer step [{default.accumulate}]")
    add("--seq", type=int, help=f"tokens per sequence [{default.seq}]")
    add(
        "--optimizer",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; adamw is that of ds-kernels if installed, else torch's [adamw]",
    )
    add("--lr", type=float, help=f"peak learning rate; warmup, then cosine to a twentieth [{default.lr:g}]")
    add("--warmup", type=int, metavar="STEPS", help="warmup steps [a quarter of the steps, at most 30]")
    add("--weight-decay", type=float, metavar="X", help=f"on matrices, not norms [{default.weight_decay:g}]")
    add("--clip", type=float, metavar="NORM", help=f"global gradient norm, 0 for none [{default.clip:g}]")
    add("--seed", type=int, help=f"of weights, data order and sampling [{default.seed}]")
    add("--checkpoint-activations", action="store_true", help="recompute activations in backward")
    add("--device", help="cpu, cuda, ... [the accelerator torch finds]")
    add("--config", type=Path, metavar="FILE", help="a DeepSpeed JSON; replaces the flags it has keys for")


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="any file or folder of UTF-8 text, at most 64 MiB of it [the Python standard library]",
    )
    add("--tokenizer", metavar="KIND", help=f"bpe (trained on the spot) or bytes [{default.tokenizer}]")
    add("--vocab", type=int, metavar="N", help=f"tokens of the bpe tokenizer [{default.vocab}]")
    add("--eval-bytes", type=int, metavar="N", help=f"held-out text to measure on [{default.eval_bytes}]")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="DIR", help="run directory [runs/train_gpt-DATE-TIME]")
    add(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="checkpoints in the background; 0: at the end alone [a quarter of the run]",
    )
    add("--keep", type=int, metavar="N", help=f"checkpoints to keep, 0 for all [{default.keep}]")
    add(
        "--switch-at",
        type=float,
        metavar="SHARE",
        help="after this share of the steps, stop and resume from the checkpoint with fewer ranks and "
        f"another stage; 0 for never [{default.switch_at:g}]",
    )
    add("--switch-stage", type=int, metavar="STAGE", help="stage after the switch [1, or 3 after stage 1]")
    add("--switch-ranks", type=int, metavar="N", help="ranks after the switch [largest proper divisor]")
    add("--stop-after", type=int, metavar="STEP", help="save and stop there, as an interruption would")
    add("--resume", type=Path, metavar="DIR", help="run directory to continue, at any world size and stage")
    add("--plain", action="store_true", help="plain lines instead of a progress bar")


@dataclass(frozen=True, slots=True)
class Parsed:
    """The command line, checked."""

    settings: Settings
    typed: frozenset[str]  # the fields of `settings` that the user gave
    saved: Mapping[str, Any] | None  # `run.json` of the resumed run


def parse(argv: Sequence[str] | None = None) -> Parsed:
    """Read the command line, and the settings of the run that it resumes.

    Raises: ValueError or OSError saying what was given, what is allowed, and what to change.
    """
    typed = vars(build_parser().parse_args(argv))
    saved = read_run(typed["resume"]) if "resume" in typed else None
    before = _settings_from_json(saved["settings"]) if saved else {}
    for name in FIXED:
        if saved and name in typed and typed[name] != before[name]:
            raise ValueError(
                f"{flag(name)} {typed[name]} contradicts --resume {typed['resume']}, which was trained with "
                f"{before[name]}: leave the flag out, or start a new run"
            )
    settings = Settings(**{**before, **typed})
    if settings.config is not None:
        _check_config(settings.config, typed, resuming=saved is not None)
    _check_values(settings)
    _check_run(settings, typed)
    return Parsed(settings, frozenset(typed), saved)


def read_run(directory: Path) -> dict[str, Any]:
    """`run.json` of an earlier run."""
    file = directory / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"--resume {directory}: no {RUN_FILE} in it; give a directory that a run made"
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


class Length(Protocol):
    """How long a run is: what `write_run` asks of `Pace`."""

    total: int | None
    warmup: int


def write_run(directory: Path, settings: Settings, global_batch: int, length: Length) -> None:
    """Put into the run directory what `--resume` needs to know before it loads a checkpoint."""
    values = {
        "settings": settings.as_json(),
        "global_batch": global_batch,
        "total": length.total,
        "warmup": length.warmup,
    }
    partial = directory / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    partial.replace(directory / RUN_FILE)


def flag(name: str) -> str:
    """The flag that sets a field of `Settings`."""
    return "--" + name.replace("_", "-")


_POSITIVE = (
    *("steps", "minutes", "batch", "accumulate", "seq", "lr"),
    *("eval_bytes", "stop_after", "switch_ranks"),
)
_OF_ONE_CALL = ("resume", "out", "stop_after", "plain", "device", "switch_at", "switch_stage", "switch_ranks")


def _settings_from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings without those of one call; a continued run does not switch again unless told to."""
    known = {f.name for f in fields(Settings)}
    kept = {k: v for k, v in values.items() if k in known and k not in _OF_ONE_CALL}
    paths = {name: Path(kept[name]) for name in ("data", "config") if kept.get(name)}
    return {**kept, **paths, "switch_at": 0.0}


def _check_config(file: Path, typed: Mapping[str, Any], *, resuming: bool) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"--config {file}: there is no such file")
    for name, key in IN_CONFIG.items():
        if name in typed and not (resuming and name in ("stage", "batch", "accumulate")):
            raise ValueError(
                f"{flag(name)} and --config {file} cannot both be given: put it into the file as {key!r}, "
                "or leave --config out"
            )


def _check_values(s: Settings) -> None:
    for name, stage in (("stage", s.stage), ("switch_stage", s.switch_stage)):
        if stage not in (None, 0, 1, 2, 3):
            raise ValueError(
                f"{flag(name)} {stage}: ZeRO has stages 1 (optimizer state), 2 (and gradients) and "
                "3 (and parameters); 0 replicates everything"
            )
    for name, value, allowed in (
        ("model_size", s.model_size, tuple(SIZES)),
        ("dtype", s.dtype, DTYPES),
        ("optimizer", s.optimizer, OPTIMIZERS),
        ("tokenizer", s.tokenizer, ("bpe", "bytes")),
    ):
        if value not in allowed:
            raise ValueError(f"{flag(name)} {value}: allowed are {', '.join(allowed)}")
    for name in _POSITIVE:
        if getattr(s, name) is not None and getattr(s, name) <= 0:
            raise ValueError(f"{flag(name)} {getattr(s, name)}: give a number above 0")
    for name in ("warmup", "weight_decay", "clip", "save_every", "keep"):
        if getattr(s, name) is not None and getattr(s, name) < 0:
            raise ValueError(f"{flag(name)} {getattr(s, name)}: give 0 or more")
    _check_ranges(s)


def _check_ranges(s: Settings) -> None:
    if s.device is not None and not s.device.isalpha():
        raise ValueError(
            f"--device {s.device}: give a kind, such as cpu or cuda; each rank takes one of them"
        )
    if not 0 <= s.switch_at < 1:
        raise ValueError(
            f"--switch-at {s.switch_at}: a share of the steps, 0 (never) up to but not including 1"
        )
    if s.eval_bytes < 64:
        raise ValueError(f"--eval-bytes {s.eval_bytes}: give at least 64")
    if s.tokenizer == "bpe" and s.vocab < 257:
        raise ValueError(
            f"--vocab {s.vocab}: byte-level BPE needs at least 257 tokens (256 bytes and a mark)"
        )
    if s.data is not None and not s.data.exists():
        raise FileNotFoundError(f"--data {s.data}: there is no such file or folder")


def _check_run(s: Settings, typed: Mapping[str, Any]) -> None:
    if s.resume and s.out and s.out != s.resume:
        raise ValueError(
            f"--out {s.out} contradicts --resume {s.resume}: a resumed run stays in its directory"
        )
    if s.out and not s.resume and (s.out / RUN_FILE).exists():
        raise ValueError(
            f"--out {s.out} holds a run already: continue it with --resume, or give another directory"
        )
    if "steps" in typed and "minutes" in typed:
        raise ValueError(
            f"--steps {s.steps} and --minutes {s.minutes:g} cannot both be given: one decides the other"
        )
    if s.steps is not None:
        for name in ("warmup", "stop_after"):
            if (getattr(s, name) or 0) > s.steps:
                raise ValueError(f"{flag(name)} {getattr(s, name)} is more than --steps {s.steps}")
    if s.switch_at == 0 and {"switch_stage", "switch_ranks"} & set(typed):
        raise ValueError(
            "--switch-stage and --switch-ranks say what follows the switch: give --switch-at as well"
        )
