"""What has a conversion that was killed or failed already written, so that the next can go on?

``<out>.partial/progress.jsonl`` starts with an identity, of the source and of what was asked for,
and has a line for each tensor that is written: its network, its name and its digests. Another
identity starts anew. What a line says is believed only after the tensor was read and hashed again.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from wan22_jax.errors import BadInput
from wan22_jax.weights import Network

_NAME = "progress.jsonl"


class Progress:
    """The tensors of a partial folder that are written, by network and official name."""

    def __init__(self, file: TextIO, entries: Sequence[Sequence[Any]]):
        self._file = file
        self.done: dict[str, dict[str, list[str]]] = {}
        for network, name, lines in entries:
            self.done.setdefault(network, {})[name] = lines

    def add(self, network: Network, name: str, lines: Sequence[str]) -> None:
        """Notes that a tensor is written; lines are those that ``write_network`` makes of it."""
        if self.done.get(network, {}).get(name) != lines:
            self._file.write(json.dumps([network, name, lines]) + "\n")
            self._file.flush()


@contextmanager
def open_progress(folder: Path, identity: str) -> Iterator[Progress]:
    """Opens a partial folder for writing, and empties it if it is of another identity.

    Afterwards the folder stays as it is, unless BadInput was raised, which the same command would
    meet again; if all went well it has no trace of the progress any more.

    Raises BadInput if another process writes into the folder.
    """
    folder.mkdir(exist_ok=True)
    with (folder / _NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder}: another wan22-convert is writing here; wait for it, or choose another "
                "--out"
            ) from None
        try:
            yield Progress(file, _read_entries(file, folder, identity))
        except BadInput:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / _NAME).unlink()


def identify(files: Mapping[str, Sequence[Path]], *about: object) -> str:
    """Hashes path, size and time of each source file, and whatever else decides the result."""
    stats = {
        network: [
            (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(paths)
        ]
        for network, paths in files.items()
    }
    return hashlib.sha256(json.dumps([stats, *map(repr, about)]).encode()).hexdigest()


def used_bytes(folder: Path) -> int:
    """Counts the bytes that a folder takes on its disk; 0 if there is none."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _read_entries(file: TextIO, folder: Path, identity: str) -> list[Any]:
    """Returns what was noted under this identity; a last line that was cut off is left out."""
    file.seek(0)
    lines = file.read().split("\n")
    if len(lines) > 1 and lines[0] == identity:
        os.truncate(file.fileno(), sum(len(line.encode()) + 1 for line in lines[:-1]))
        return [json.loads(line) for line in lines[1:-1]]
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _NAME:
            path.unlink()
    os.truncate(file.fileno(), 0)
    file.write(identity + "\n")
    file.flush()
    return []
