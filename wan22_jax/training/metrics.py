"""What a run reports while it goes: one progress line and TensorBoard scalars.

A step's numbers are read one step late, so that reading them never keeps the device waiting.
"""

import math
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar
from tqdm import tqdm

from wan22_jax.errors import BadInput

SMOOTHING = 0.98  # of the loss in the progress line
FLUSH_S = 10  # curves on disk are at most this old, and so is what a killed run loses of them


class StepReport(NamedTuple):
    """What is known of a step when it is dispatched; the metrics are still on the device."""

    step: int  # counted from 1: steps done after it
    epoch: int
    ends_epoch: bool
    num_tokens: int
    lr: float
    metrics: dict[str, jax.Array]
    clips: tuple[str, ...]


class Progress:
    """The progress line and the TensorBoard writer of one run; a context."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, logging_steps: int):
        # Not SummaryWriter: its thread dies on a full disk, and the run would then wait for it.
        self._writer = EventsWriter(str(run_dir / "events"))
        self._flushed_at = time.monotonic()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._logging_steps = logging_steps
        self._pending: StepReport | None = None
        self._pushed_at: float | None = None
        self._speed = ""
        self._average_loss: float | None = None
        self._epoch_losses: list[float] = []

    def __enter__(self) -> "Progress":
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

        Args:
            report: the step.
            new_program: this step was compiled first, which is kept out of the speed.

        Raises:
            BadInput: the loss of the step before is not finite.
        """
        if self._pending is not None:
            self._pending.metrics["loss"].block_until_ready()
        now = time.perf_counter()
        if self._pending is not None:
            start = None if new_program else self._pushed_at
            self._finish(self._pending, None if start is None else now - start)
        self._pending, self._pushed_at = report, now
        if new_program:
            self.flush()

    def flush(self) -> None:
        """Waits for the last dispatched step and writes it; raises BadInput as ``push`` does."""
        if self._pending is not None:
            self._finish(self._pending, None)
        self._pending = self._pushed_at = None

    def say(self, line: str) -> None:
        """Prints a line above the progress line."""
        self._bar.write(line)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Writes what was measured beside the steps, such as an evaluation."""
        for name, value in values.items():
            self._add_scalar(name, value, step)

    def _finish(self, report: StepReport, seconds: float | None) -> None:
        values = {name: float(value) for name, value in report.metrics.items() if value.ndim == 0}
        if not math.isfinite(values["loss"]):
            raise BadInput(
                f"the loss of step {report.step} is {values['loss']} (clips: "
                f"{', '.join(report.clips)}); lower lr and resume from the last checkpoint"
            )
        self._epoch_losses.append(values["loss"])
        if self._average_loss is None:
            self._average_loss = values["loss"]
        self._average_loss += (1 - SMOOTHING) * (values["loss"] - self._average_loss)
        speed = {}
        if seconds is not None:
            speed = {"step_time_s": seconds, "tokens_per_s": report.num_tokens / seconds}
            self._speed = f"{seconds:.3f} s/step, {speed['tokens_per_s']:,.0f} tokens/s"
        line = f"epoch {report.epoch}, avr_loss {self._average_loss:.4f}, lr {report.lr:.2e}"
        self._bar.set_postfix_str(", ".join(filter(None, (line, self._speed))), refresh=False)
        self._bar.update(1)
        if report.step % self._logging_steps == 0:
            for name, value in ({"lr": report.lr} | values | speed).items():
                self._add_scalar(f"train/{name}", value, report.step)
        if report.ends_epoch:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._add_scalar("train/epoch_loss", mean, report.epoch)
            self._epoch_losses = []
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._writer.write_event(event)
