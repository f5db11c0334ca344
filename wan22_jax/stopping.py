"""How does a user tell a run that goes on to save itself, or to stop?

By SIGINT (Ctrl-C) or SIGTERM: the run finishes its step, saves and ends; a second one ends it at
once. By files in its folder: ``save`` for a checkpoint now, ``save_quit`` to end after it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SAVE, SAVE_QUIT = "save", "save_quit"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish(NamedTuple):
    """What the user wants after this step."""

    checkpoint: bool
    stop: bool


class Wishes:
    """What signals and files have asked for; see ``listen``."""

    def __init__(self, run_dir: Path):
        self._files = (run_dir / SAVE, run_dir / SAVE_QUIT)
        self.signal: str | None = None

    def read(self) -> Wish:
        """Returns what is asked for now. Files stay until ``fulfil``."""
        if self.signal is not None:
            return Wish(checkpoint=True, stop=True)
        save, save_quit = self._files
        stop = save_quit.exists()
        return Wish(checkpoint=stop or save.exists(), stop=stop)

    def fulfil(self, wish: Wish) -> None:
        """Removes the files that a wish came from: what they asked for is done."""
        if wish.checkpoint:
            for file in self._files:
                file.unlink(missing_ok=True)


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
