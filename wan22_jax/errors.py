"""What a user sees when the input, not the program, is wrong: one line and exit code 2."""

import errno
import sys
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        message = f"the disk is full{where}; free some space and run the same command again"
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    else:
        return 0
    sys.stderr.write(f"error: {message}\n")
    return 2
