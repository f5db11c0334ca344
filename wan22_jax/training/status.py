"""How is a run at this moment? A small JSON file in its folder says so to other processes."""

import json
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from wan22_jax.errors import BadInput

FILE = "status.json"
VERSION = 1


class Status(NamedTuple):
    """What the file holds; None is not known yet, or not known here."""

    state: str  # "running", "done", "stopped", or "failed: <why>"
    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float | None = None
    average_loss: float | None = None
    lr: float | None = None
    step_s: float | None = None  # smoothed, as all speeds are
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    model_tflops: float | None = None
    peak_memory_gb: float | None = None  # 10^9 bytes of the device
    device: str = ""
    # Filled in by ``write_status``:
    written_at: float = 0.0  # seconds since 1970
    host: str = ""
    process: int = 0
    process_started: str = ""  # tells it from a later process of the same number


def write_status(run_dir: Path, status: Status) -> None:
    """Replaces the file in one move, so that readers see the old one or the new one."""
    process = os.getpid()
    status = status._replace(
        written_at=time.time(),
        host=socket.gethostname(),
        process=process,
        process_started=_start_of(process),
    )
    unfinished = run_dir / f".{FILE}.{process}"
    unfinished.write_text(json.dumps({"version": VERSION, **status._asdict()}, indent=1) + "\n")
    unfinished.replace(run_dir / FILE)


def read_status(run_dir: Path) -> Status | None:
    """Reads the file; None if there is none, BadInput if it is of another version."""
    path = run_dir / FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields.pop("version") != VERSION:
            raise ValueError(f"version {VERSION} was expected")
        return Status(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            f"{path}: is not a status of this version ({error}); delete it, the run or the next "
            "resume writes it anew"
        ) from None


def is_alive(status: Status) -> bool | None:
    """Whether the process that wrote the status still runs; None if that is another host's."""
    if status.host != socket.gethostname():
        return None
    return status.process_started == _start_of(status.process) != ""


def _start_of(process: int) -> str:
    # Field 22 of Linux's stat, counted behind the name, which may hold spaces: ticks since boot.
    try:
        fields = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2]
    except OSError:
        return ""
    state, started = fields.split()[0], fields.split()[19]
    return "" if state == "Z" else started
