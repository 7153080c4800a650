"""The main job: trains a GPT with ZeRO on local text, resumes it at another world size, and reports."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_core import Accelerator, leave_distributed
from ds_zero.recipes.build import Split, split_batch
from ds_zero.recipes.data import ByteTokenizer, choose_tokenizer
from ds_zero.recipes.evaluate import compressor_bits
from ds_zero.recipes.flags import Parsed, Settings, parse, write_run
from ds_zero.recipes.from_config import with_config
from ds_zero.recipes.model import GPTConfig, count_parameters, gpt_config, sample
from ds_zero.recipes.pace import Pace
from ds_zero.recipes.phase import PhaseRunner, Run
from ds_zero.recipes.prepare import choose_dtype, prepare_text, prompt_of, refuse_if_too_big
from ds_zero.recipes.progress import Progress
from ds_zero.recipes.ranks import Ranks
from ds_zero.recipes.record import Record
from ds_zero.recipes.report import SAME_LOSS, Facts, resume_difference, write_report

_SAMPLE_TOKENS = 96
_LET_RANK_0_SPEAK_S = 4.0  # a launcher ends all ranks when the first one fails; rank 0 says goodbye first
USER_ERRORS = (ValueError, LookupError, OSError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Switch:
    """Where the run stops, and how it goes on."""

    at: float  # share of the steps
    split: Split
    stage: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the resumed loss was not the saved one, 2 an input that cannot work."""
    try:
        return train(argv)
    except USER_ERRORS as error:
        if isinstance(error, KeyError | IndexError):
            raise  # nothing that a user gave: a fault of ours, with its traceback
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(_LET_RANK_0_SPEAK_S)
        sys.stderr.write(f"train_gpt: {f'[rank {rank}] ' if rank else ''}error: {error}\n")
        return 2


def train(argv: Sequence[str] | None) -> int:
    """Everything between the command line and the exit code. Collective over the launcher's ranks."""
    began = time.monotonic()
    parsed = parse(argv)
    settings = parsed.settings
    if settings.device is not None:
        os.environ["DS_ACCELERATOR"] = settings.device
    ranks = Ranks.join(Accelerator.current())
    settings = with_config(settings, parsed.typed, ranks.world)
    settings = replace(settings, dtype=choose_dtype(settings.dtype, ranks))
    split = first_split(parsed, settings, ranks.world)
    switch = plan_switch(settings, split)
    run = prepare_run(settings, parsed.saved or {}, ranks, split, switch)
    with run.progress:
        runner = run_phases(run, split, switch)
    code = finish(runner, began) if runner else 0
    leave_distributed()  # not after an error: that must not wait for the other ranks
    return code


def first_split(parsed: Parsed, settings: Settings, world: int) -> Split:
    """Batch and accumulation as the flags say; a resumed run keeps its global batch at any world size."""
    given = Split(settings.batch, settings.accumulate, world)
    kept = given.global_batch if parsed.saved is None else int(parsed.saved["global_batch"])
    if kept == given.global_batch:
        return given
    if "accumulate" in parsed.typed:
        raise ValueError(
            f"--accumulate {given.accumulate} x --batch {given.batch} x {world} ranks is a global batch of "
            f"{given.global_batch}, {settings.resume} was trained with {kept}: leave --accumulate out"
        )
    return split_batch(kept, given.batch, world)


def plan_switch(settings: Settings, split: Split) -> Switch | None:
    """With fewer ranks (the largest proper divisor; one stays one) and at stage 1, or 3 after stage 1."""
    if not settings.switch_at or settings.stop_after or settings.steps == 1:
        return None
    world = split.world
    fewer = settings.switch_ranks or max((n for n in range(1, world) if world % n == 0), default=1)
    if fewer > world:
        raise ValueError(f"--switch-ranks {fewer} is more than the {world} rank(s) of this run")
    stage = settings.switch_stage
    if stage is None:
        stage = 3 if settings.stage == 1 else 1
    return Switch(settings.switch_at, split.over(fewer), stage)


def prepare_run(
    settings: Settings, saved: Mapping[str, Any], ranks: Ranks, split: Split, switch: Switch | None
) -> Run:
    """Run directory, text, model configuration. Refuses what does not fit before a weight exists."""
    now = ranks.share(lambda: torch.tensor([int(time.time())]))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(now)))
    directory = settings.resume or settings.out or Path("runs") / f"train_gpt-{stamp}"
    progress = Progress(show=ranks.leads, plain=settings.plain)
    kind, message = choose_tokenizer(settings.tokenizer)
    settings = replace(settings, tokenizer=kind)
    if message:
        progress.say(message)
    vocab = ByteTokenizer.vocab if kind == "bytes" else settings.vocab
    planned = model_config(settings, vocab)
    refuse_if_too_big(settings, planned, split, settings.stage, ranks)
    if switch:
        refuse_if_too_big(settings, planned, switch.split, switch.stage, ranks, when="after the switch, ")
    text = prepare_text(settings, directory, ranks)
    config = model_config(settings, text.tokenizer.vocab)
    steps = settings.steps or saved.get("total")
    warmup = settings.warmup if settings.warmup is not None else saved.get("warmup")
    pace = Pace(steps, warmup, settings.minutes)
    if ranks.leads:
        write_run(directory, settings, split.global_batch, pace)
    numel = count_parameters(config)
    progress.say(f"{settings.model_size}: {numel:,} parameters in {settings.dtype}; {text.description}")
    progress.say(f"run directory: {directory}")
    return Run(settings, directory, ranks, text, config, numel, pace, progress, Record())


def model_config(settings: Settings, vocab: int) -> GPTConfig:
    """The transformer that the flags describe."""
    return gpt_config(
        settings.model_size,
        vocab,
        tied=settings.tied,
        seq=settings.seq,
        checkpoint_activations=settings.checkpoint_activations,
    )


def run_phases(run: Run, split: Split, switch: Switch | None) -> PhaseRunner | None:
    """Train to the end, with the switch on the way; None on ranks that are no longer needed. Collective."""
    settings = run.settings

    def end(total: int) -> int:
        if switch is None:
            return min(total, settings.stop_after or total)
        return max(1, min(total - 1, round(switch.at * total)))

    resume = settings.resume is not None
    runner = PhaseRunner(run, split, settings.stage, resume=resume, end=end)
    runner.train()
    if switch is None:
        return runner
    del runner
    gc.collect()
    if not run.ranks.regroup(switch.split.world):
        return None
    # Threads for the cores that became free, unless they would wait by spinning (not under `ds launch`).
    if run.ranks.accelerator.is_cpu and os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        torch.set_num_threads(torch.get_num_threads() * split.world // switch.split.world)
    runner = PhaseRunner(run, switch.split, switch.stage, resume=True, end=lambda total: total)
    runner.train()
    return runner


def finish(runner: PhaseRunner, began: float) -> int:
    """Sample, write the report, show it. Collective: sampling runs the model on every rank."""
    run = runner.run
    prompt = prompt_of(run.text.heldout)
    new = sample(runner.job.model, prompt, _SAMPLE_TOKENS, context=run.settings.seq, seed=run.settings.seed)
    if not run.ranks.leads:
        return 0
    facts = Facts(
        job=f"{run.settings.model_size} on {run.text.description}",
        num_parameters=run.numel,
        heldout_bytes=len(run.text.heldout.text),
        compressors=compressor_bits(run.text.heldout.text),
        sample=(run.text.tokenizer.decode(prompt), run.text.tokenizer.decode(new)),
        settings=run.settings.as_json(),
        seconds=time.monotonic() - began,
        notes=run.text.notes,
    )
    run.progress.say(write_report(run.record, facts, run.directory))
    bound = SAME_LOSS[run.settings.dtype]
    off = [d for d in map(resume_difference, run.record.phases) if d is not None and d > bound]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
