"""What a run reports while it goes: one progress line and TensorBoard scalars.

A step's numbers are read one step late, so that reading them never keeps the device waiting.
"""

import math
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from wan22_jax.errors import BadInput

SMOOTHING = 0.98  # of the loss in the progress line


class StepReport(NamedTuple):
    """What is known of a step when it is dispatched; the metrics are still on the device."""

    step: int  # counted from 1: steps done after it
    epoch: int
    num_tokens: int
    lr: float
    metrics: dict[str, jax.Array]
    clips: tuple[str, ...]


class Progress:
    """The progress line and the TensorBoard writer of one run; a context."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, logging_steps: int):
        self._writer = SummaryWriter(str(run_dir))
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._logging_steps = logging_steps
        self._pending: StepReport | None = None
        self._read_at = time.perf_counter()
        self._average_loss: float | None = None
        self._epoch_losses: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._writer.close()

    def push(self, report: StepReport, *, new_program: bool) -> None:
        """Takes a dispatched step and writes the one before it.

        Raises:
            BadInput: the loss of the step before is not finite.
        """
        self.flush()
        self._pending = report
        if new_program:  # its time is mostly compilation: keep it out of the speed
            self._finish(report, is_timed=False)

    def flush(self) -> None:
        """Waits for the last dispatched step and writes it; raises BadInput as ``push`` does."""
        if self._pending is not None:
            self._finish(self._pending, is_timed=True)

    def end_epoch(self, epoch: int) -> None:
        """Writes the mean loss of the epoch that ended."""
        self.flush()
        if self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._writer.add_scalar("train/epoch_loss", mean, epoch)
        self._epoch_losses = []

    def say(self, line: str) -> None:
        """Prints a line above the progress line."""
        self._bar.write(line)

    def _finish(self, report: StepReport, *, is_timed: bool) -> None:
        values = {name: float(value) for name, value in report.metrics.items()}
        now = time.perf_counter()
        seconds, self._read_at, self._pending = now - self._read_at, now, None
        if not math.isfinite(values["loss"]):
            raise BadInput(
                f"the loss of step {report.step} is {values['loss']} (clips: "
                f"{', '.join(report.clips)}); lower lr and resume from the last checkpoint"
            )
        self._epoch_losses.append(values["loss"])
        kept = SMOOTHING if math.isfinite(self._average_loss) else 0.0
        self._average_loss = (
            kept * (self._average_loss if kept else 0) + (1 - kept) * values["loss"]
        )
        line = {"epoch": report.epoch, "avr_loss": f"{self._average_loss:.4f}"}
        if is_timed:
            line |= {"s/step": f"{seconds:.3f}", "tokens/s": f"{report.num_tokens / seconds:,.0f}"}
        self._bar.set_postfix(line, refresh=False)
        self._bar.update(1)
        if report.step % self._logging_steps == 0:
            scalars = {"lr": report.lr, **values}
            if is_timed:
                scalars |= {"step_time_s": seconds, "tokens_per_s": report.num_tokens / seconds}
            for name, value in scalars.items():
                self._writer.add_scalar(f"train/{name}", value, report.step)
