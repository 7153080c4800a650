"""What a DeepSpeed file has printed while training: progress lines, phase times, samples per second."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from ds_core.ground.accelerator import Accelerator
from ds_core.setup.plan import Reporting
from ds_core.train.clock import clock_for
from ds_core.train.engine import StepReport

_log = logging.getLogger("ds_core")
_PHASES = ("forward", "backward", "step")


class Progress:
    """Times the phases of a step and writes a line every `steps_per_print` steps, on rank 0.

    With a phase breakdown and no `steps_per_print` there is a line every step. Phases are marked by events
    that are read when their line is written, so no phase waits for the device.
    """

    def __init__(self, reporting: Reporting, accelerator: Accelerator, rank: int) -> None:
        self.reporting = reporting
        self.every = reporting.steps_per_print or (1 if reporting.wall_clock_breakdown else None)
        self._accelerator, self._rank = accelerator, rank
        self._clock = clock_for(accelerator.device)
        self._spans: list[tuple[str, Any, Any]] = []
        self._samples = 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside, if anybody asked for it."""
        if not self.reporting.wall_clock_breakdown:
            yield
            return
        begin = self._clock.mark()
        yield
        self._spans.append((name, begin, self._clock.mark()))

    def tick(self, report: StepReport, samples: int, skipped: int, lrs: list[float]) -> None:
        """After an optimizer step over `samples` samples of all ranks."""
        self._samples += samples
        if self.every is None or report.step % self.every:
            return
        now = self._now()
        line = f"step={report.step}, skipped={skipped}, lr={lrs}, loss={report.loss:.6g}"
        line += f", grad_norm={report.grad_norm:.4g}"
        if self.reporting.throughput:
            line += f", samples/s={self._samples / max(now - self._since, 1e-9):.1f}"
        if self.reporting.wall_clock_breakdown:
            spent = dict.fromkeys(_PHASES, 0.0)
            for name, begin, end in self._spans:
                spent[name] += self._clock.seconds(begin, end)
            line += "".join(f", {name}={spent[name] * 1e3:.1f} ms" for name in _PHASES)
        if self._rank == 0:
            _log.info(line)
        self._spans.clear()
        self._samples, self._since = 0, now

    def _now(self) -> float:
        if self.reporting.synchronize:
            self._accelerator.synchronize()
        return time.perf_counter()


def make_audible(reporting: Reporting) -> None:
    """Set the log level that was asked for; lines nobody would see get a handler on stderr."""
    wanted = reporting.log_level or ("info" if _speaks(reporting) else None)
    if wanted is None:
        return
    for name in ("ds_core", "ds_zero", "ds_comm"):
        logger = logging.getLogger(name)
        logger.setLevel(wanted.upper())
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
            logger.addHandler(handler)


def _speaks(reporting: Reporting) -> bool:
    lines = reporting.comms is not None and (reporting.comms.verbose or reporting.comms.debug)
    return bool(reporting.steps_per_print or reporting.wall_clock_breakdown or reporting.dump_state or lines)
