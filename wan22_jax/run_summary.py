"""What has become of a run? Told from its folder alone, while it goes or afterwards.

Neither the GPU nor a checkpoint is opened, so that asking never disturbs the run.
"""

import time
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wan22_jax.checkpoint import FOLDER
from wan22_jax.errors import BadInput
from wan22_jax.training.events import EPOCH_LOSS, PATTERN, Curve, Session, read_events
from wan22_jax.training.metrics import format_duration
from wan22_jax.training.status import FILE, Status, is_alive, read_status

SILENT_S = 120  # without a sign of life from another host: something may be wrong
TREND_STEPS = 500


class Saved(NamedTuple):
    """A checkpoint or an exported adapter in the run folder."""

    path: Path
    saved_at: float  # seconds since 1970
    num_bytes: int


class RunSummary(NamedTuple):
    """All that a run's folder tells."""

    run_dir: Path
    status: Status | None  # None: a run of an earlier version
    sessions: list[Session]
    curves: dict[str, Curve]  # by TensorBoard name
    checkpoints: list[Saved]  # by step
    adapters: list[Saved]  # by time


def read_run(run_dir: Path) -> RunSummary:
    """Reads a run folder; BadInput if it is none."""
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: there is no such folder; give a run folder of wan22-train")
    if not is_run(run_dir):
        raise BadInput(
            f"{run_dir}: is not a run folder of wan22-train (neither {FILE} nor an event file is "
            "in it); give one <date>_<time> folder of output_dir"
        )
    sessions, curves = read_events(run_dir)
    steps = [path for path in (run_dir / FOLDER).glob("*") if path.name.isdigit()]
    files = [path for path in run_dir.glob("*/*.safetensors") if path.parent.name != FOLDER]
    return RunSummary(
        run_dir,
        read_status(run_dir),
        sessions,
        curves,
        [_measure(path) for path in sorted(steps, key=lambda path: int(path.name))],
        sorted(map(_measure, files), key=lambda saved: saved.saved_at),
    )


def is_run(folder: Path) -> bool:
    """Whether wan22-train made this folder."""
    return (folder / FILE).is_file() or any(folder.glob(PATTERN))


def find_newest(output_dir: Path) -> Path:
    """Returns the newest run folder in ``output_dir``; BadInput if there is none."""
    runs = sorted(path for path in output_dir.glob("*") if is_run(path))
    if not runs:
        raise BadInput(f"{output_dir}: holds no run yet; name a run folder or start a run")
    return runs[-1]


def describe_run(run: RunSummary) -> list[str]:
    """Returns the lines that ``wan22-train --status`` prints."""
    rows = [("run", str(run.run_dir)), ("state", describe_state(run.status))]
    status = run.status
    if status is not None:
        share = status.step / status.total_steps
        rows.append(
            (
                "step",
                f"{status.step:,} of {status.total_steps:,} ({share:.1%}), "
                f"epoch {status.epoch} of {status.epochs}",
            )
        )
    rows += [("loss", text) for text in _describe_loss(run)]
    if status is not None:
        rows += _describe_speed(status)
    if run.checkpoints:
        last = run.checkpoints[-1]
        others = len(run.checkpoints) - 1
        rows.append(
            (
                "checkpoint",
                f"step {last.path.name}, {_ago(last.saved_at)}, {format_bytes(last.num_bytes)}"
                + (f"; {others} more" if others else ""),
            )
        )
    else:
        rows.append(("checkpoint", "none yet"))
    if run.adapters:
        names = [str(saved.path.relative_to(run.run_dir)) for saved in run.adapters]
        shown = ", ".join(names[-3:])
        more = f" and {len(names) - 3} earlier" if len(names) > 3 else ""
        rows.append(("exported", shown + more))
    for session in run.sessions[1:]:
        changes = "; ".join(session.changes) or "nothing changed"
        rows.append(("resumed", f"after step {session.first_step:,}, {_date(session)}: {changes}"))
    if run.sessions:
        rows.append(("config", f"sha256 {digest_config(run.sessions[-1])}"))
    return [f"{name:<11} {text}" for name, text in rows]


def describe_state(status: Status | None) -> str:
    """Says whether the run goes on, has ended or seems dead."""
    if status is None:
        return "not known (a run of an earlier version)"
    last = f"last sign of life {_ago(status.written_at)}"
    if status.state != "running":
        return f"{status.state}, {_ago(status.written_at)}"
    who = f"process {status.process} on {status.host}"
    alive = is_alive(status)
    if alive is None:
        is_silent = time.time() - status.written_at > SILENT_S
        doubt = "; it may be dead, or compile" if is_silent else ""
        return f"running as {who} when last heard of, {last}{doubt}"
    if not alive:
        return f"dead: {who} is gone without a word, {last}; --resume_from_checkpoint goes on"
    return f"running as {who}, {last}"


def digest_config(session: Session) -> str:
    """Returns the first digits of the SHA-256 of a session's config."""
    return sha256(session.config.encode()).hexdigest()[:12]


def measure_trend(curve: Curve) -> tuple[float, int] | None:
    """Compares the mean of the later half of the last steps with that of the earlier half.

    Returns:
        The relative change and over how many values; None if there are too few.
    """
    values_N = curve.values_N[-TREND_STEPS:]
    values_N = values_N[np.isfinite(values_N)]
    half = len(values_N) // 2
    if half < 10:
        return None
    before = float(values_N[:half].mean())
    return (float(values_N[half:].mean()) / before - 1 if before else 0.0), len(values_N)


def format_bytes(num_bytes: int) -> str:
    """Formats in MB or GB (10^6, 10^9)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _describe_loss(run: RunSummary) -> list[str]:
    lines = []
    status = run.status
    if status is not None and status.loss is not None:
        text = f"{status.loss:.4f} now, {status.average_loss:.4f} smoothed"
        trend = measure_trend(run.curves["train/loss"]) if "train/loss" in run.curves else None
        if trend is not None:
            text += f", trend {trend[0]:+.1%} within the last {trend[1]} values"
        lines.append(text)
    if EPOCH_LOSS in run.curves:
        curve = run.curves[EPOCH_LOSS]
        pairs = list(zip(curve.steps_N.tolist(), curve.values_N.tolist(), strict=True))[-4:]
        lines.append(", ".join(f"epoch {epoch}: {loss:.4f}" for epoch, loss in pairs))
    for name, curve in sorted(run.curves.items()):
        if name.endswith("/loss") and not name.startswith("train/"):
            best = int(curve.values_N.argmin())
            lines.append(
                f"{name}: {curve.values_N[-1]:.4f} at step {curve.steps_N[-1]:,}, "
                f"best {curve.values_N[best]:.4f} at step {curve.steps_N[best]:,}"
            )
    return lines


def _describe_speed(status: Status) -> list[tuple[str, str]]:
    rows = []
    if status.step_s is not None:
        text = f"{status.step_s:.3f} s/step, {status.samples_per_s:.3g} samples/s, "
        text += f"{status.tokens_per_s:,.0f} tokens/s, {status.model_tflops:.3g} model TFLOP/s"
        rows.append(("speed", text))
        left = status.total_steps - status.step
        if status.state == "running" and left > 0 and is_alive(status) is not False:
            seconds = left * status.step_s
            ends = datetime.fromtimestamp(status.written_at + seconds, UTC)
            rows.append(("ETA", f"{format_duration(seconds)}, at {ends:%Y-%m-%d %H:%M} UTC"))
    if status.lr is not None:
        rows.append(("lr", f"{status.lr:.3e}"))
    peak = status.peak_memory_gb
    memory = "peak not known" if peak is None else f"peak {peak:.1f} GB"
    rows.append(("memory", f"{memory} on {status.device}"))
    return rows


def _measure(path: Path) -> Saved:
    """Measures a file, or a folder's files; of those that vanish while it looks there is none."""
    num_bytes, saved_at = 0, 0.0
    for file in [path, *path.rglob("*")]:
        try:
            stat = file.stat()
        except FileNotFoundError:  # retention deleted it
            continue
        if not file.is_dir():
            num_bytes += stat.st_size
            saved_at = max(saved_at, stat.st_mtime)
    return Saved(path, saved_at, num_bytes)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    return f"{seconds:.0f} s ago" if seconds < 100 else f"{format_duration(seconds)} ago"


def _date(session: Session) -> str:
    return f"{datetime.fromtimestamp(session.started_at, UTC):%Y-%m-%d %H:%M} UTC"
