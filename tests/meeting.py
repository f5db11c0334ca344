"""Processes that meet and then wait, or fail; with few imports, as tests start many of them."""

import argparse
import logging
import sys
import time
from collections.abc import Callable

from wan22_jax import processes
from wan22_jax.errors import BadInput


def meet(action: Callable[[], None] | None = None) -> int:
    """Runs an action, or the one that the command line names, in this process of several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=("fail", "wait"))
    parser.add_argument("--meeting_s", type=int, default=processes.MEETING_S)
    processes.add_process_arguments(parser)
    args = parser.parse_args()
    processes.MEETING_S = args.meeting_s
    logging.basicConfig(stream=sys.stdout)
    return processes.run_together(args, action or {"fail": fail, "wait": wait}[args.name])


def fail() -> None:
    """One process is wrong, the other one waits for it."""
    if processes.index() == 1:
        raise BadInput("lora.toml: is\nno good")
    processes.gather(None, "never")


def wait() -> None:
    """To be killed."""
    print("waiting", flush=True)  # noqa: T201
    time.sleep(600)


if __name__ == "__main__":
    sys.exit(meet())
