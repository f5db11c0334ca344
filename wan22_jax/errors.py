"""What a user sees when the input, not the program, is wrong: one line and exit code 2."""

import errno
import os
import sys
import unicodedata
from collections.abc import Callable


class BadInput(Exception):
    """A mistake the user can mend; the message names the file, what was expected and the remedy."""


def run_command(command: Callable[[], object]) -> int:
    """Runs a console command; turns BadInput and a full disk into one line and exit code 2."""
    try:
        command()
    except BadInput as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if is_full_disk(error):
            where = f" while writing {error.filename}" if error.filename else ""
            message = f"the disk is full{where}; free some space and run the same command again"
        elif error.errno in _WRONG_PATH and error.filename:
            message = f"{error.filename}: {error.strerror}; choose another path or mend this one"
        else:
            raise
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    else:
        return 0
    sys.stderr.write(f"error: {one_line(message)}\n")
    return 2


def one_line(text: str) -> str:
    """Makes a text that quotes file names, which may hold any bytes, safe for a terminal.

    Line breaks and other control characters show as escapes, what is no UTF-8 as '?'.
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROLS else c
        for c in text.encode(errors="replace").decode()
    )


_CONTROLS = ("Cc", "Zl", "Zp")


def is_full_disk(error: Exception) -> bool:
    """Whether a disk, or a quota, is full; libraries in C++ say so in the text of other errors."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(os.strerror(number) in str(error) for number in numbers)


# What a path can be that a user gave. Not ENOENT: that a file is not there is told apart earlier.
_WRONG_PATH = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EBUSY,  # a mount point
)
