"""What was learnt of a file before: its size and rate, its digest, how it compares.

One line a fact, appended as soon as it is known: a checksum, then JSON. A line that a killed run
left half-written, or that is damaged, is not believed. A fact counts for a file of the same length
and modification time. This is a shortcut only: where the folder cannot be written, all is learnt
again.
"""

import json
import os
import stat
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wan22_jax.errors import BadInput

FACTS_FILE = "probed.jsonl"
_VERSION = 1  # of what is learnt


class Stamp(NamedTuple):
    """When a file counts as the same."""

    num_bytes: int
    mtime_ns: int


def read_stamp(path: Path) -> Stamp:
    """Reads the stamp of a file; raises BadInput if it cannot be read, or is a pipe or device."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would keep its reader waiting
        raise BadInput(f"{path}: is not a file; remove it")
    return Stamp(status.st_size, status.st_mtime_ns)


def check_stamp(path: Path, stamp: Stamp) -> None:
    """Raises BadInput if a file has changed since its stamp was read."""
    if read_stamp(path) != stamp:
        raise BadInput(f"{path}: changed while it was read; run the same command again")


class Facts:
    """The facts about the files of one folder, for any number of threads."""

    def __init__(self, folder: Path):
        """Reads what is known.

        Args:
            folder: the cache folder; made when there is something to write.
        """
        self._path = folder / FACTS_FILE
        self._lock = threading.Lock()
        self._file: int | None = None
        self._writes = True
        self._known: dict[str, tuple[Any, Any]] = {}  # what -> stamps, fact
        self._num_lines = 0
        try:
            with self._path.open("rb") as lines:
                for line in lines:
                    self._believe(line)
        except OSError:
            pass

    def __enter__(self) -> "Facts":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            if self._num_lines > 2 * len(self._known) + 100:
                self._compact()

    def recall(self, what: str, paths: dict[Path, Stamp], learn: Callable[[], Any]) -> Any:
        """Returns a fact as JSON knows it, from memory or by learning it now.

        Args:
            what: names the fact.
            paths: the files that it is about, each with its stamp.
            learn: returns the fact; called only if it is not known of these very files.

        Raises:
            BadInput: a file changed meanwhile; and what ``learn`` raises.
        """
        stamps = [list(stamp) for stamp in paths.values()]
        known = self._known.get(what)
        if known is not None and known[0] == stamps:
            return known[1]
        fact = json.loads(json.dumps(learn()))
        for path, stamp in paths.items():
            check_stamp(path, stamp)
        self._append(what, stamps, fact)
        return fact

    def _believe(self, line: bytes) -> None:
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if not body or checksum != _checksum(body):
            return
        self._num_lines += 1
        version, *rest = json.loads(body)
        if version == _VERSION:
            what, stamps, fact = rest
            self._known[what] = stamps, fact

    def _append(self, what: str, stamps: list[list[int]], fact: Any) -> None:
        line = _make_line(what, stamps, fact)
        with self._lock:
            self._known[what] = stamps, fact
            if not self._writes:
                return
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                    self._file = os.open(self._path, flags, 0o666)
                    line = b"\n" + line  # ends what a killed run left
                os.write(self._file, line)
                self._num_lines += 1
            except OSError:
                self._writes = False

    def _compact(self) -> None:
        partial = self._path.with_name(f"{FACTS_FILE}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.writelines(_make_line(what, *known) for what, known in self._known.items())
            partial.rename(self._path)
        except OSError:
            partial.unlink(missing_ok=True)


def _make_line(what: str, stamps: list[list[int]], fact: Any) -> bytes:
    body = json.dumps([_VERSION, what, stamps, fact]).encode()
    return b"%s %s\n" % (_checksum(body), body)


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
