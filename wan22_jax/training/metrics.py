"""What a run reports while it goes: one progress line, TensorBoard scalars and its status.

A step's numbers are read one step late, so that reading them never keeps the device waiting.
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.geometry import Bucket
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.processes import is_main
from wan22_jax.sharding import peak_memory
from wan22_jax.training.events import EventLog, NoLog, Session
from wan22_jax.training.flops import count_flops
from wan22_jax.training.status import Status, write_status
from wan22_jax.training.wandb_log import WandbLog

log = logging.getLogger(__name__)

SMOOTHING = 0.98  # of the loss in the progress line
SPEED_SMOOTHING = 0.9
FLUSH_S = 10  # curves on disk are at most this old, and so is what a killed run loses of them
STATUS_S = 5  # and the status
PRINT_S = 10  # between lines in a log, unless steps_per_print says
TASKS = ("t2v", "i2v")  # by number in the metric "task_AB"
NUM_DECILES = 10
_LINE = "{percentage:3.0f}%|{bar:10}| {desc}"  # of tqdm


class NonFiniteLoss(BadInput):
    """The loss or the gradient of a step is infinite or NaN; names the step and its clips."""


class StepReport(NamedTuple):
    """What is known of a step when it is dispatched; the metrics are still on the device."""

    step: int  # counted from 1: steps done after it
    epoch: int
    ends_epoch: bool
    bucket: Bucket
    metrics: dict[str, jax.Array]  # "loss", "grad_norm", and of each example "loss_AB", ...
    clips: tuple[str, ...]


class Plan(NamedTuple):
    """What a run is going to do, as far as its progress is concerned."""

    total_steps: int
    epochs: int
    logging_steps: int  # TensorBoard gets the scalars of every so manieth step
    steps_per_print: int | None  # lines where stdout is no terminal; None: every PRINT_S
    model: TransformerConfig
    lr_N: np.ndarray  # of the session's steps
    trains_weights: bool  # full fine-tuning, see ``count_flops``
    skips_nonfinite: bool = False  # a loss that is not changes nothing and does not end the run


class Progress:
    """The progress line, the event file, the status and the W&B run of a session; a context.

    Of several processes the first writes them; the others only look at the losses.
    """

    def __init__(
        self,
        run_dir: Path,
        session: Session,
        plan: Plan,
        *,
        earlier_losses: Sequence[float] = (),
        epoch_losses: Sequence[float] = (),
        wandb: WandbLog | None = None,
    ):
        """Opens the session's event file and writes its first status.

        Args:
            run_dir: the run's folder.
            session: how this start of wan22-train goes on.
            plan: what is going to be done.
            earlier_losses: that earlier sessions logged, up to the first step.
            epoch_losses: those of them that belong to the epoch of the next step.
            wandb: gets the scalars too.
        """
        self._run_dir, self._session, self._plan, self._wandb = run_dir, session, plan, wandb
        self._events = EventLog(run_dir, session) if is_main() else NoLog()
        # Where the line cannot be rewritten, in a log, plain lines take its place.
        self._bar = tqdm(
            total=plan.total_steps,
            initial=session.first_step,
            dynamic_ncols=True,
            bar_format=_LINE,
            disable=not (is_main() and sys.stderr.isatty() and sys.stdout.isatty()),
        )
        self._pending: StepReport | None = None
        self._pushed_at: float | None = None
        self._losses = _Losses()
        self._epoch_losses = list(epoch_losses)
        self._status = Status(
            "running",
            session.first_step,
            plan.total_steps,
            session.first_epoch,
            plan.epochs,
            average_loss=_average(None, earlier_losses),
            device=jax.local_devices()[0].device_kind,
        )
        self._flushed_at = self._printed_at = time.monotonic()
        self._write_status()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = "done" if self._status.step >= self._plan.total_steps else "stopped"
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            state = f"failed: {' '.join(f'{error}'.split())[:500] or kind.__name__}"
        self._bar.close()
        self._status = self._status._replace(state=state)
        self._write_status()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)
        self._events.close()

    def push(self, report: StepReport, *, new_program: bool) -> None:
        """Takes a dispatched step and writes the one before it.

        Args:
            report: the step.
            new_program: this step was compiled first, which is kept out of the speed.

        Raises:
            NonFiniteLoss: of the step before.
        """
        for array in report.metrics.values():
            array.copy_to_host_async()
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
        """Waits for the last dispatched step and writes it; raises as ``push`` does.

        What is known is then on disk: a checkpoint that follows finds the losses of its epoch.
        """
        if self._pending is not None:
            self._finish(self._pending, None)
        self._pending = self._pushed_at = None
        self._events.flush()

    def say(self, line: str) -> None:
        """Prints a line above the progress line."""
        if self._bar.disable:
            log.info("%s", line)
        else:
            self._bar.write(line)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Writes what was measured beside the steps, such as an evaluation."""
        self._events.write(values, step)
        if self._wandb is not None:
            self._wandb.write(values, step)

    def add_animation(self, name: str, gif: bytes, step: int) -> None:
        """Writes a small video to TensorBoard."""
        self._events.write_animation(name, gif, step)

    def add_text(self, name: str, content: str, step: int) -> None:
        """Writes a text to TensorBoard."""
        self._events.write_text(name, content, step)

    def _finish(self, report: StepReport, seconds: float | None) -> None:
        metrics = jax.device_get(report.metrics)
        loss = float(metrics["loss"])
        problem = _find_nonfinite(report, metrics)
        if problem is not None and not self._plan.skips_nonfinite:
            raise NonFiniteLoss(
                f"{problem}; lower lr and resume, or set skip_nonfinite_steps = true"
            )
        lr = float(self._plan.lr_N[report.step - 1 - self._session.first_step])
        self._status = self._status._replace(step=report.step, epoch=report.epoch, lr=lr)
        if problem is None:
            self._epoch_losses.append(loss)
            self._losses.add(metrics)
            average = _average(self._status.average_loss, [loss])
            self._status = self._status._replace(loss=loss, average_loss=average)
        else:
            self.say(f"warning: {problem}; the step changed nothing")
            metrics = {}
        speed = {}
        if seconds is not None:
            speed = self._measure(report, seconds)
        if report.step % self._plan.logging_steps == 0:
            values = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
            values |= {"lr": lr} | speed | self._losses.take()
            if (peak := peak_memory()) is not None:
                values["peak_memory_gb"] = peak / 1e9
                self._status = self._status._replace(peak_memory_gb=peak / 1e9)
            self.add_scalars(
                {f"train/{name}": value for name, value in values.items()}, report.step
            )
        if report.ends_epoch:
            self._finish_epoch(report)
        self._show(report)

    def _measure(self, report: StepReport, seconds: float) -> dict[str, float]:
        num_clips, num_tokens = len(report.clips), report.bucket.num_tokens
        flops = count_flops(self._plan.model, num_tokens, trains_weights=self._plan.trains_weights)
        amounts = {
            "samples_per_s": num_clips,
            "tokens_per_s": num_clips * num_tokens,
            "model_tflops": num_clips * flops / 1e12,
        }
        smoothed = self._status.step_s or seconds
        smoothed += (1 - SPEED_SMOOTHING) * (seconds - smoothed)
        rates = {name: amount / smoothed for name, amount in amounts.items()}
        self._status = self._status._replace(step_s=smoothed, **rates)
        return {"step_time_s": seconds} | {n: amount / seconds for n, amount in amounts.items()}

    def _finish_epoch(self, report: StepReport) -> None:
        if not self._epoch_losses:  # all were skipped
            return
        mean = sum(self._epoch_losses) / len(self._epoch_losses)
        self._events.write_epoch(mean, report.epoch)
        if self._wandb is not None:
            self._wandb.write_epoch(mean, report.epoch, report.step)
        self._epoch_losses = []

    def _show(self, report: StepReport) -> None:
        line = describe_status(self._status)
        self._bar.set_description_str(line, refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        every = self._plan.steps_per_print
        is_last = report.step == self._plan.total_steps
        is_due = now - self._printed_at >= PRINT_S if every is None else report.step % every == 0
        if self._bar.disable and (is_due or is_last):
            log.info("%s", line)
            self._printed_at = now
        if now - self._flushed_at >= FLUSH_S:
            self._events.flush()
            self._flushed_at = now
        if time.time() - self._status.written_at >= STATUS_S:
            self._write_status()

    def _write_status(self) -> None:
        if not is_main():
            return
        self._status = self._status._replace(written_at=time.time())
        try:
            write_status(self._run_dir, self._status)
        except OSError as error:
            if not is_full_disk(error):
                raise
            log.warning("the disk is full: the status of the run was not written")


def _find_nonfinite(report: StepReport, metrics: dict[str, np.ndarray]) -> str | None:
    for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
        if not math.isfinite(value := float(metrics[name])):
            clips = ", ".join(report.clips)
            return f"the {what} of step {report.step} is {value} (clips: {clips})"
    return None


def _average(before: float | None, losses: Sequence[float]) -> float | None:
    for loss in losses:
        before = loss if before is None else before + (1 - SMOOTHING) * (loss - before)
    return before


def describe_status(status: Status) -> str:
    """Puts a run's progress into one line."""
    parts = [f"step {status.step}/{status.total_steps}", f"epoch {status.epoch}/{status.epochs}"]
    if status.step_s is not None and status.samples_per_s is not None:
        parts += [f"{status.step_s:.3f} s/step", f"{status.samples_per_s:.3g} samples/s"]
    if status.average_loss is not None and status.lr is not None:
        parts += [f"avr_loss {status.average_loss:.4f}", f"lr {status.lr:.2e}"]
    if status.peak_memory_gb is not None:
        parts.append(f"{status.peak_memory_gb:.1f} GB")
    if status.step_s is not None:
        left = status.step_s * max(0, status.total_steps - status.step)
        parts.append(f"ETA {format_duration(left)}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Formats as h:mm:ss, with days where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"


class _Losses:
    """Mean losses by task and by noise level since they were taken last."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds a step's examples: "loss_AB", "sigma_AB" and "task_AB"."""
        losses, sigmas, tasks = (
            np.ravel(metrics[f"{name}_AB"]).tolist() for name in ("loss", "sigma", "task")
        )
        for loss, sigma, task in zip(losses, sigmas, tasks, strict=True):
            for name in (f"loss_{TASKS[task]}", name_decile(sigma)):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + loss, count + 1)

    def take(self) -> dict[str, float]:
        """Returns the means by scalar name; of what no example had there is none."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def name_decile(sigma: float) -> str:
    """Names the scalar of losses at a noise level: "loss_sigma_0.3-0.4"."""
    number = min(int(sigma * NUM_DECILES), NUM_DECILES - 1)
    return f"loss_sigma_{number / NUM_DECILES:.1f}-{(number + 1) / NUM_DECILES:.1f}"
