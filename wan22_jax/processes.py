"""Which processes train together, how do they agree on small things, and how do all end alike?

Each process has GPUs of its own and runs the same program on all of them. What they tell each other
here goes through JAX's coordinator, a service in process 0, not through the GPUs: it waits for no
step, and works before there are arrays. With one process nothing here costs anything.

A process that ends with an error tells the others, which end too. One that is lost is missed by the
coordinator, and JAX then ends the others.
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed  # no public name leads to the coordinator's values
from jax.experimental import multihost_utils

from wan22_jax.errors import BadInput, run_command

MEETING_S = 300  # for all processes to start
HEARTBEAT_S = 60  # after which a process that says nothing is lost
_LEAVING_S = 5  # for a process to end by itself when another has failed
_POLL_S = 1
_KEY = "wan22_jax"
_FLAGS = ("coordinator_address", "num_processes", "process_id")
_LAUNCHER_FLAGS = (
    "--deepspeed",
    "--deepspeed_config",
    "--local_rank",
    "--local-rank",
    "--num_gpus",
)
_calls: Counter[str] = Counter()  # the coordinator keeps each value under a name of its own
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where the processes meet, how many they are, and which one this is; None: JAX finds out."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a start without a launcher that JAX knows."""
    group = parser.add_argument_group(
        "several processes", "found out under SLURM, Open MPI 4 and Kubernetes; elsewhere give all"
    )
    group.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="a free port of the host of process 0, the same for all processes",
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")
    for flag in _LAUNCHER_FLAGS:
        parser.add_argument(flag, nargs="?", const=True, help=argparse.SUPPRESS)


def find_place(args: argparse.Namespace) -> Place | None:
    """Finds out from flags and environment whether there is more than one process.

    Returns:
        None where there is one.

    Raises:
        BadInput: the flags do not fit together, or a launcher has started several processes that
            cannot find each other.
    """
    for flag in _LAUNCHER_FLAGS:
        if getattr(args, flag.removeprefix("--").replace("-", "_")) is not None:
            raise BadInput(
                f"{flag} is of DeepSpeed's launcher, and there is none here: start wan22-train "
                "itself, which takes all GPUs; CUDA_VISIBLE_DEVICES shows it fewer, [parallel] "
                "says what is divided among them"
            )
    given = Place(*(getattr(args, name) for name in _FLAGS))
    if given != Place():
        return _check(given)
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables:  # started by srun, not by a plain line of a script
        count = int(variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS") or 1)
        return Place(num_processes=count) if count > 1 else None
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in variables:
            return Place()
        raise BadInput(
            "mpirun has started several processes, but this Open MPI does not say where they meet; "
            "give --coordinator_address HOST:PORT --num_processes $OMPI_COMM_WORLD_SIZE "
            "--process_id $OMPI_COMM_WORLD_RANK"
        )
    if "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables:
        if find_spec("kubernetes") is not None:
            return Place()
        raise BadInput(
            "this is a pod of an indexed Job of Kubernetes; install jax[k8s] so that the pods find "
            "each other, or give --coordinator_address, --num_processes and --process_id "
            "(HOST:PORT, 1 and 0 to train alone)"
        )
    if "LOCAL_RANK" in variables and variables.get("WORLD_SIZE", "1") != "1":
        raise BadInput(
            "torchrun, or a launcher like it, has started several processes, each of which would "
            "train alone on all GPUs; start wan22-train itself, which takes all GPUs, or give "
            "--coordinator_address HOST:PORT --num_processes $WORLD_SIZE --process_id $RANK"
        )
    return None


def run_together(args: argparse.Namespace, action: Callable[[], object]) -> int:
    """Runs a command in all processes, or in the one that there is; returns its exit code.

    Several end together: if one fails, the others end with its exit code. Nothing of JAX's may have
    been used before but its configuration.

    Args:
        args: with ``add_process_arguments``.
        action: the command, see ``run_command``.
    """
    code = run_command(lambda: _join(find_place(args)))
    if code != 0:
        return code
    if count() == 1:
        return run_command(action)
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(is_over,), name="watcher", daemon=True)
    watcher.start()
    try:
        code = run_command(lambda: _announce_failure(action))
    except BaseException as error:  # told here, as the process does not end in the usual way
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            sys.stderr.write(
                "error: a GPU has failed, or another process is lost; see what the others say, "
                "then go on with --resume_from_checkpoint\n"
            )
        code = 1
    if code != 0:
        _leave(code)
    gather(None, "end")
    is_over.set()
    watcher.join()
    jax.distributed.shutdown()
    return 0


def count() -> int:
    """How many processes train together."""
    state = distributed.global_state
    return 1 if state.client is None else state.num_processes


def index() -> int:
    """Which one of them this is."""
    return 0 if count() == 1 else distributed.global_state.process_id


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return index() == 0


def gather(value: Any, name: str) -> list[Any]:
    """Returns the values of all processes, by process; waits until all have called.

    Args:
        value: what JSON can hold.
        name: of what is told; calls of one name come from one thread, in the same order everywhere.
    """
    if count() == 1:
        return [value]
    key = _next_key(name)
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_await(f"{key}/{process}")) for process in range(count())]


def from_main(function: Callable[[], Any], name: str) -> Any:
    """Calls a function in process 0 alone; all processes return, or raise, what it does.

    Args:
        function: its result is what JSON can hold; the other processes get it as JSON has it.
        name: as of ``gather``.

    Raises:
        BadInput: the function raises it.
    """
    if count() == 1:
        return function()
    key = _next_key(name)
    if not is_main():
        answer = json.loads(_await(key))
        if "error" in answer:
            raise BadInput(answer["error"])
        return answer["result"]
    try:
        answer = {"result": function()}
    except BadInput as error:
        _client().key_value_set(key, json.dumps({"error": str(error)}))
        raise
    _client().key_value_set(key, json.dumps(answer))
    return answer["result"]


def agree(problem: str | None, name: str) -> None:
    """Raises BadInput in all processes if one of them has a problem; ``name`` as of ``gather``."""
    for process, other in enumerate(gather(problem, name)):
        if other is not None:
            where = f"process {process}: " if count() > 1 else ""
            raise BadInput(f"{where}{other}")


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copies an array to the host, whole.

    All processes have to call this, in the same order, if none has all of it.
    """
    if is_held(array):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_held(array: jax.Array | np.ndarray) -> bool:
    """Whether a process has all of an array, so that it can read it alone."""
    return not isinstance(array, jax.Array) or (
        array.is_fully_addressable or array.is_fully_replicated
    )


def _check(given: Place) -> Place | None:
    address, number, process = given
    missing = [f"--{name}" for name, value in zip(_FLAGS, given, strict=True) if value is None]
    if address is None or number is None or process is None:
        raise BadInput(f"{', '.join(missing)} missing; give {', '.join(f'--{n}' for n in _FLAGS)}")
    port = address.rpartition(":")[2]
    if ":" not in address or not port.isdigit() or not 0 < int(port) < 2**16:
        raise BadInput(f"--coordinator_address {address}: expected HOST:PORT, as gpu-1:12345")
    if number < 1 or not 0 <= process < number:
        raise BadInput(
            f"--process_id {process} of --num_processes {number}: expected 0 to "
            "--num_processes - 1, another one for each process"
        )
    return given if number > 1 else None


def _join(place: Place | None) -> None:
    if place is None:
        return
    address = place.coordinator_address
    if address is not None and place.process_id == 0:
        _check_port(address)

    def give_up() -> None:
        where = distributed.global_state.coordinator_address or address or "the coordinator"
        sys.stderr.write(
            f"error: {where}: not all {place.num_processes or ''} processes met there in "
            f"{MEETING_S} s; check that all were started, that this is the host of process 0 and "
            "that the port is open\n"
        )
        sys.stderr.flush()
        os._exit(2)  # JAX waits in C++, and would end the process with a trace of that

    timer = threading.Timer(MEETING_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *place,
            cluster_detection_method=None if address is None else "deactivate",
            initialization_timeout=MEETING_S + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(
            f"the processes cannot find each other ({' '.join(str(error).split())}); give "
            "--coordinator_address, --num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()
    if not is_main():
        logging.getLogger("wan22_jax").setLevel(logging.WARNING)
    log.info("%d processes train together", count())


def _check_port(address: str) -> None:
    port = int(address.rpartition(":")[2])
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:  # JAX would end with a segmentation fault
        raise BadInput(
            f"--coordinator_address {address}: the port cannot be opened ({error.strerror}); "
            "choose another one, for all processes"
        ) from None


def _announce_failure(action: Callable[[], object]) -> None:
    try:
        action()
    except BaseException as error:
        text = " ".join(str(error).split()) or type(error).__name__
        failure = {
            "process": index(),
            "host": socket.gethostname(),
            "text": text[:2000],
            "code": 2 if isinstance(error, BadInput) else 1,
        }
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            _client().key_value_set(f"{_KEY}/failed", json.dumps(failure))
        raise


def _watch(is_over: threading.Event) -> None:
    """Ends this process when another one has failed: it may be waiting for that one for ever."""
    client = _client()
    while not is_over.wait(_POLL_S):
        try:
            failure = json.loads(client.key_value_try_get(f"{_KEY}/failed"))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the coordinator is lost; JAX ends this process
        if failure["process"] == index() or is_over.wait(_LEAVING_S):
            return
        sys.stderr.write(
            f"error: process {failure['process']} on {failure['host']} has failed, and so this one "
            f"ends: {failure['text']}\n"
        )
        _leave(failure["code"])


def _leave(code: int) -> NoReturn:
    """Ends the process at once: JAX would wait for the others first, and they for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client = _client()
        client.key_value_set(f"{_KEY}/left/{index()}", "", allow_overwrite=True)
        if is_main():  # without its coordinator JAX ends the others, whatever they are saying
            for process in range(1, count()):
                client.blocking_key_value_get(f"{_KEY}/left/{process}", 3000 * _LEAVING_S)
    os._exit(code)


def _client() -> Any:
    return distributed.global_state.client


def _next_key(name: str) -> str:
    _calls[name] += 1
    return f"{_KEY}/{name}/{_calls[name]}"


def _await(key: str) -> str:
    while True:  # however long it takes: if a process fails, or is lost, this one ends
        try:
            return _client().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
