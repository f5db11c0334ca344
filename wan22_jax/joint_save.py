"""How do several processes write the arrays of one checkpoint, so that all succeed or all fail?

Each writes what its devices hold, process 0 then joins it to what one process would have written.
Orbax's own way of doing this has processes wait for minutes for one that has failed; here they tell
each other how it went.
"""

import asyncio
import errno
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from wan22_jax.errors import is_full_disk
from wan22_jax.processes import from_main, gather

_Problem = tuple[bool, str]  # whether a disk is full, and what was said


class JointSave:
    """One save; made on the main thread of all processes, completed by a thread of each."""

    def __init__(self, folder: Path, items: Mapping[str, Mapping[str, jax.Array]]):
        """Copies the arrays to the host and starts to write them.

        Args:
            folder: is made.
            items: path -> array of each.
        """
        self._folder, self._items = folder, items
        self._handlers = {name: ocp.StandardCheckpointHandler() for name in items}
        self._writes = []
        made = from_main(lambda: _try(self._make_folders), "save_folders")
        self._problem: _Problem | None = made or _try(self._start)

    def complete(self, publish: Callable[[], None]) -> None:
        """Waits until all is written; process 0 then calls ``publish``.

        Raises:
            OSError: the disk was full for one of the processes, or for ``publish``.
            RuntimeError: another one of them failed to write.
        """
        problem = self._problem or _try(self._wait)
        problems = [found for found in gather(problem, "saved") if found is not None]
        if not problems:
            published = from_main(lambda: _try(lambda: self._publish(publish)), "published")
            problems = [published] if published else []
        for handler in self._handlers.values():
            handler.close()
        for is_full, text in problems:
            raise OSError(errno.ENOSPC, text) if is_full else RuntimeError(text)

    def _make_folders(self) -> None:
        for name in self._items:
            (self._folder / name).mkdir(parents=True)

    def _start(self) -> None:
        for name, arrays in self._items.items():
            writing = self._handlers[name].async_save(
                epath.Path(self._folder / name), args=ocp.args.StandardSave(dict(arrays))
            )
            self._writes += asyncio.run(writing) or []

    def _wait(self) -> None:
        for write in self._writes:
            write.result()

    def _publish(self, publish: Callable[[], None]) -> None:
        for name, handler in self._handlers.items():
            handler.finalize(epath.Path(self._folder / name))
        publish()


def _try(action: Callable[[], None]) -> _Problem | None:
    try:
        action()
    except (OSError, ValueError) as error:  # TensorStore raises ValueError only
        return is_full_disk(error), f"{type(error).__name__}: {error}"
    return None
