"""How does a user tell a run that goes on to save itself, or to stop?

By SIGINT (Ctrl-C) or SIGTERM: the run finishes its step, saves and ends; a second one ends it at
once. By files in its folder: ``save`` for a checkpoint now, ``save_quit`` to end after it.

Several processes have to do the same after the same step, though a signal reaches one of them and
their clocks differ. So each of them votes after every step, in an all-reduce that takes its place
behind the steps on the devices, and what one of them wants is done one step later by all.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wan22_jax import processes

SAVE, SAVE_QUIT = "save", "save_quit"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish(NamedTuple):
    """What the user wants after this step."""

    checkpoint: bool
    stop: bool
    late: bool | None = None  # a checkpoint, by some process's clock; None: there was no vote


class Wishes:
    """What signals and files have asked for; see ``listen``."""

    def __init__(self, run_dir: Path):
        self._files = (run_dir / SAVE, run_dir / SAVE_QUIT)
        self.signal: str | None = None
        self._votes = Votes(len(Wish._fields)) if processes.count() > 1 else None

    def read(self) -> Wish:
        """Returns what is asked for now, or was in the last vote. Files stay until ``fulfil``.

        Waits for the steps before that vote.
        """
        return self._look() if self._votes is None else Wish(*self._votes.read())

    def ends_at_once(self) -> bool:
        """Whether to leave what is done between two steps; several processes finish it together."""
        return self._votes is None and self._look().stop

    def _look(self) -> Wish:
        if self.signal is not None:
            return Wish(checkpoint=True, stop=True)
        if not processes.is_main():  # one of them looks for files
            return Wish(checkpoint=False, stop=False)
        save, save_quit = self._files
        stop = save_quit.exists()
        return Wish(checkpoint=stop or save.exists(), stop=stop)

    def fulfil(self, wish: Wish, *, late: bool = False) -> None:
        """Removes the files that a wish came from: what they asked for is done.

        Several processes then vote on what they do after the next step.

        Args:
            wish: from ``read``.
            late: see ``Cadence.is_late``; by the clock of this process.
        """
        if wish.checkpoint and processes.is_main():
            for file in self._files:
                file.unlink(missing_ok=True)
        if self._votes is not None:
            now = self._look()
            self._votes.cast((now.checkpoint, now.stop, late))


class Votes:
    """Votes of all processes on a few things at a time: what one wants is accepted."""

    def __init__(self, number: int):
        """``number``: of things."""
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        self._shape = (jax.device_count(), number)
        self._sharding = NamedSharding(mesh, PartitionSpec("all"))
        accepted = NamedSharding(mesh, PartitionSpec())
        self._count = jax.jit(lambda votes: votes.max(axis=0), out_shardings=accepted)
        self._accepted: jax.Array | None = None

    def cast(self, wanted: Sequence[bool]) -> None:
        """Dispatches a vote, for which all processes have to call this in the same place."""
        votes_DW = np.broadcast_to(np.array(wanted, np.int32), self._shape)
        votes = jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: votes_DW[index]
        )
        accepted = self._count(votes)
        accepted.copy_to_host_async()
        self._accepted = accepted

    def read(self) -> list[bool]:
        """Returns what the last vote has accepted; nothing before the first one."""
        if self._accepted is None:
            return [False] * self._shape[1]
        return np.asarray(self._accepted, bool).tolist()


@contextmanager
def listen(run_dir: Path) -> Iterator[Wishes]:
    """Takes signals for wishes inside of this context.

    Args:
        run_dir: where the files may appear; those of an earlier run are removed first.
    """
    wishes = Wishes(run_dir)
    wishes.fulfil(Wish(checkpoint=True, stop=False))

    def take(number: int, _: object) -> None:
        wishes.signal = signal.Signals(number).name
        for other in _SIGNALS:  # the second one does not have to wait for Python
            signal.signal(other, signal.SIG_DFL)
        # Not print: the signal may have come while something was being printed.
        line = f"\n{wishes.signal}: finishing the step and saving; once more ends the run at once\n"
        os.write(2, line.encode())

    if threading.current_thread() is not threading.main_thread():
        yield wishes  # only the main thread may take signals
        return
    before = {number: signal.signal(number, take) for number in _SIGNALS}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
