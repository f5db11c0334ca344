"""The TensorBoard event files of a run: one a session, and what they say together.

A session is one start of wan22-train, new or resumed. It opens a file of its own and says in it
where it goes on; what an earlier session had written of later steps is then of a past that the
checkpoint undid, and is left out where files are read together.
"""

import io
import json
import logging
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import text

from wan22_jax.errors import is_full_disk

log = logging.getLogger(__name__)

PATTERN = "events.out.tfevents.*"
EPOCH_LOSS = "train/epoch_loss"  # the one curve whose x axis counts epochs
_SESSION, _CONFIG = "session", "config"  # tags of texts


class Session(NamedTuple):
    """One start of wan22-train: where it goes on, and with what."""

    started_at: float  # seconds since 1970
    first_step: int  # steps that were done before it
    first_epoch: int  # epoch of its first step, counted from 1
    examples_per_step: int  # 0: x axes count steps; else examples, so many a step
    changes: tuple[str, ...]  # "key before -> after", against the session before
    config: str  # TOML


class Curve(NamedTuple):
    """One scalar of a run, in ascending order."""

    steps_N: np.ndarray  # or epochs
    values_N: np.ndarray


class EventLog:
    """Writes one session's event file; values are on disk after ``flush``."""

    def __init__(self, run_dir: Path, session: Session):
        # Not SummaryWriter: its thread dies on a full disk, and the run would then wait for it.
        # The name sorts after those of earlier sessions, even within their second.
        suffix = f".{sum(1 for _ in run_dir.glob(PATTERN)):04d}"
        self._disk_was_full = False
        self._writer = EventsWriter(str(run_dir / "events"), suffix)
        about = json.dumps(session._replace(config="")._asdict())
        indented = "".join(f"    {line}\n" for line in session.config.splitlines())  # as Markdown
        self._write(text(_SESSION, about), session.first_step)
        self._write(text(_CONFIG, indented), session.first_step)
        self._per_step = session.examples_per_step or 1

    def write(self, values: dict[str, float], step: int) -> None:
        """Adds values of a step under their TensorBoard names."""
        self._write(_scalars(values), step * self._per_step)

    def write_epoch(self, loss: float, epoch: int) -> None:
        """Adds the mean loss of an epoch."""
        self._write(_scalars({EPOCH_LOSS: loss}), epoch)

    def write_animation(self, name: str, gif: bytes, step: int) -> None:
        """Adds a GIF, as TensorBoard shows a video."""
        with Image.open(io.BytesIO(gif)) as picture:
            width_px, height_px = picture.size
        image = Summary.Image(
            height=height_px, width=width_px, colorspace=3, encoded_image_string=gif
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._write(summary, step * self._per_step)

    def write_text(self, name: str, content: str, step: int) -> None:
        """Adds a text, which TensorBoard reads as Markdown."""
        self._write(text(name, content), step * self._per_step)

    def flush(self) -> None:
        """Puts on disk what has been added."""
        with self._past_full_disk():
            self._writer.flush()

    def close(self) -> None:
        """Puts the rest on disk and closes the file."""
        with self._past_full_disk():
            self._writer.close()

    def _write(self, summary: Summary, x: int) -> None:
        with self._past_full_disk():
            self._writer.write_event(Event(wall_time=time.time(), step=x, summary=summary))

    @contextmanager
    def _past_full_disk(self) -> Iterator[None]:
        """Curves are worth less than the run: what a full disk does not take is lost."""
        try:
            yield
        except OSError as error:
            if not is_full_disk(error):
                raise
            if not self._disk_was_full:
                log.warning("the disk is full: curves are not written, training goes on")
            self._disk_was_full = True


class NoLog:
    """What a process that does not write has in place of an ``EventLog``."""

    def _ignore(self, *_: object) -> None:
        pass

    write = write_epoch = write_animation = write_text = flush = close = _ignore


def read_events(run_dir: Path) -> tuple[list[Session], dict[str, Curve]]:
    """Reads all event files of a run, which may be growing, as one run.

    Returns:
        The sessions, and the curves by TensorBoard name over steps (``EPOCH_LOSS`` over epochs),
        whatever the x axes of the files count.
    """
    sessions: list[Session] = []
    parts: dict[str, list[Curve]] = {}
    for path in sorted(run_dir.glob(PATTERN)):
        session, points = _read_file(path)
        if session is not None:
            sessions.append(session)
            for name, before in parts.items():
                is_epochs = name == EPOCH_LOSS
                last = session.first_epoch - 1 if is_epochs else session.first_step
                parts[name] = [
                    Curve(x_N[x_N <= last], values_N[x_N <= last]) for x_N, values_N in before
                ]
        per_step = (session.examples_per_step if session else 0) or 1
        for name, (xs, values) in points.items():
            x_N = np.asarray(xs) // (1 if name == EPOCH_LOSS else per_step)
            parts.setdefault(name, []).append(Curve(x_N, np.asarray(values)))
    return sessions, {name: _join(some) for name, some in parts.items()}


def iterate_events(path: Path) -> Iterator[Event]:
    """Yields the events up to a record that is not whole: the file grows, or its run was killed.

    A record is its length (8 bytes), a checksum (4), the event and a checksum (4).
    """
    data = path.read_bytes()
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length
        if end + 4 > len(data):
            return
        try:
            yield Event.FromString(data[start + 12 : end])
        except DecodeError:
            return
        start = end + 4


def _join(parts: list[Curve]) -> Curve:
    x_N = np.concatenate([part.steps_N for part in parts])
    values_N = np.concatenate([part.values_N for part in parts])
    # Of one step's values, the last written counts: the first in the reversed order.
    kept_N, last_N = np.unique(x_N[::-1], return_index=True)
    return Curve(kept_N, values_N[::-1][last_N])


def _read_file(path: Path) -> tuple[Session | None, dict[str, tuple[list[int], list[float]]]]:
    about: dict | None = None
    config = ""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for event in iterate_events(path):
        for value in event.summary.value:
            if value.tag.startswith(f"{_SESSION}/"):
                about = json.loads(value.tensor.string_val[0])
            elif value.tag.startswith(f"{_CONFIG}/"):
                lines = value.tensor.string_val[0].decode().splitlines()
                config = "".join(f"{line[4:]}\n" for line in lines)
            elif value.HasField("simple_value"):
                xs, values = points.setdefault(value.tag, ([], []))
                xs.append(event.step)
                values.append(value.simple_value)
    if about is None:
        return None, points
    return Session(**about | {"changes": tuple(about["changes"]), "config": config}), points


def _scalars(values: dict[str, float]) -> Summary:
    return Summary(
        value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    )
