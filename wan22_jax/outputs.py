"""Where may a command write, and how does what it makes get its name?

A place is tried before the work, so that no hours are lost to a name that cannot be. What is made
is written beside its final name and renamed once it is complete; a link is followed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan22_jax.errors import BadInput, is_full_disk


def check_folder(folder: Path) -> None:
    """Raises BadInput if files cannot be written into a folder, there already or not."""
    with _explaining(folder):
        _write_something(folder.resolve())


def check_output(out: Path) -> None:
    """Raises BadInput if a file or folder cannot be written, or cannot get this name."""
    with _explaining(out):
        target = out.resolve()
        if os.path.ismount(target):
            raise BadInput(
                f"{out}: is a mount point, so it cannot be replaced; choose a name inside of it, "
                "or mount the folder that it is in"
            )
        _partial_of(target).exists()  # where a name that is too long is told
        _write_something(target.parent)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Gives a path to write a file or folder to, which gets its name if nothing fails.

    Else it is removed; so is what a process that was killed has left there.

    Args:
        out: the final name; its folder is made if need be.
    """
    out = out.resolve()
    partial = _partial_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            replace_folder(partial, out)
        else:
            partial.replace(out)
    finally:
        _remove(partial)


def replace_folder(partial: Path, out: Path) -> None:
    """Gives a complete folder its name; an earlier one of that name is deleted after that."""
    out = out.resolve()
    old = out.with_name(f".{out.name}.old")
    if out.is_dir():
        _remove(old)  # of a process that was killed here
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.is_dir() and not out.exists():
            old.rename(out)
        raise
    _remove(old)


def _partial_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@contextmanager
def _explaining(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a loop, before Python 3.13
        if is_full_disk(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{out}: cannot be written ({reason}); choose another place") from error


def _write_something(folder: Path) -> None:
    """Makes a file, and removes it, in a folder or where that would have to be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
