"""Several processes on loopback: they agree, save together, end together, and lose one another."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wan22_jax import processes, train
from wan22_jax.checkpoint import (
    FOLDER,
    find_damage,
    open_checkpoints,
    read_trainable,
    restore_state,
)
from wan22_jax.errors import BadInput
from wan22_jax.processes import Place, add_process_arguments, find_place, run_together
from wan22_jax.training.step import TrainState

ROOT = Path(__file__).parents[1]
TOGETHER, MEETING = (
    str(Path(__file__).with_name(f"{name}.py")) for name in ("together", "meeting")
)
DEADLINE_S = 120


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Group:
    """Processes of one run, with their outputs; those that still run in the end are killed."""

    def __init__(self, folder: Path, *command: str, number: int = 2, devices: int = 1):
        address = f"127.0.0.1:{find_port()}"
        flags = re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"])
        self.outputs = [folder / f"{address.replace(':', '.')}.{i}.log" for i in range(number)]
        self.processes = []
        for process, output in enumerate(self.outputs):
            place = ("--coordinator_address", address, "--num_processes", str(number))
            with output.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *place, "--process_id", str(process)],
                        cwd=folder,
                        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)

    def codes(self) -> list[int]:
        """Waits for all of them."""
        return [process.wait(DEADLINE_S) for process in self.processes]

    def said(self, process: int | None = None) -> str:
        outputs = self.outputs if process is None else [self.outputs[process]]
        return "\n".join(output.read_text("utf-8", "replace") for output in outputs)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    return parser.parse_args(flags)


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "8"}, Place(num_processes=8)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Place()),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "--process_id \\$OMPI_COMM_WORLD_RANK"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (POD, "install jax\\[k8s\\]"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2"}, None),  # of a machine with that in its environment
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "torchrun.* --process_id \\$RANK"),
    ],
)
def test_the_environment_says_whether_there_are_several(variables, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_", "LOCAL_RANK", "WORLD_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected):
            find_place(parse())
    else:
        assert find_place(parse()) == expected


def test_flags_win_over_the_environment(monkeypatch):
    for name, value in (SLURM | POD | {"SLURM_NTASKS": "8"}).items():
        monkeypatch.setenv(name, value)
    flags = ("--coordinator_address", "gpu-1:1234", "--num_processes")
    assert find_place(parse(*flags, "2", "--process_id", "1")) == Place("gpu-1:1234", 2, 1)
    assert find_place(parse(*flags, "1", "--process_id", "0")) is None


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (("--coordinator_address", "gpu-1:1234"), "--num_processes, --process_id missing"),
        (("--num_processes", "2", "--process_id", "0"), "--coordinator_address missing"),
        (("--coordinator_address", "gpu-1", "--num_processes", "2", "--process_id", "0"), "gpu-1:"),
        (("--coordinator_address", "a:1", "--num_processes", "2", "--process_id", "2"), "_id 2 of"),
        (("--coordinator_address", "a:1", "--num_processes", "0", "--process_id", "0"), "s 0: exp"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, culprit, capsys):
    assert train.main(["--config", "lora.toml", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line


def test_a_port_that_is_taken_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        flags = ("--coordinator_address", address, "--num_processes", "2", "--process_id", "0")
        assert train.main(["--config", "lora.toml", *flags]) == 2
    assert f"{address}: the port cannot be opened" in capsys.readouterr().err


def test_one_process_is_asked_nothing(capsys):
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    nothing = object()
    assert processes.from_main(lambda: nothing, "name") is nothing
    assert processes.gather(nothing, "name") == [nothing]
    with pytest.raises(BadInput, match=r"^no good$"):
        processes.agree("no good", "name")
    assert run_together(parse(), lambda: processes.agree("no good", "name")) == 2
    assert capsys.readouterr().err == "error: no good\n"


@pytest.fixture(scope="module")
def agreed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agreed")
    with Group(folder, TOGETHER, devices=2) as group:
        assert group.codes() == [0, 0], group.said()
    return folder


def test_two_processes_agree_vote_and_save_together(agreed):
    """The program asserts it, in both."""
    assert sorted(path.name for path in (agreed / "saving" / FOLDER).iterdir()) == ["1", "3"]
    assert find_damage(agreed / "saving" / FOLDER / "3") is None


def test_what_they_saved_is_restored_onto_other_devices(agreed):
    expected = 3 + np.arange(32, dtype=np.float32).reshape(8, 4)
    trainable, meta = read_trainable(agreed / "saving")
    np.testing.assert_array_equal(trainable["w"], expected)
    assert meta["step"] == 3
    for number, spec in ((1, PartitionSpec()), (4, PartitionSpec(None, "all"))):
        sharding = NamedSharding(Mesh(np.array(jax.devices()[:number]), ("all",)), spec)
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        like = TrainState(
            jax.device_put(np.int32(0), whole),
            {"w": jax.device_put(np.zeros((8, 4), np.float32), sharding)},
            jax.device_put({"m": np.zeros((8, 4), np.float32), "count": np.int32(0)}, whole),
        )
        with open_checkpoints(agreed / "saving") as checkpoints:
            state, _ = restore_state(checkpoints, like)
        assert state.trainable["w"].sharding == sharding
        np.testing.assert_array_equal(state.trainable["w"], expected)
        np.testing.assert_array_equal(state.opt_state["m"], 3 * (expected - 3))


def test_one_that_fails_ends_the_other(tmp_path):
    with Group(tmp_path, MEETING, "fail") as group:
        assert group.codes() == [2, 2], group.said()
    assert group.said(1).splitlines()[-1] == "error: lora.toml: is no good"
    last = group.said(0).splitlines()[-1]
    assert last.startswith("error: process 1 on ")
    assert last.endswith("has failed, and so this one ends: lora.toml: is no good")


def test_one_that_does_not_come_is_missed(tmp_path):
    with Group(tmp_path, MEETING, "wait", "--meeting_s", "2") as group:
        group.processes[1].kill()
        assert group.processes[0].wait(DEADLINE_S) == 2
    assert "not all 2 processes met there in 2 s" in group.said(0)


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_lost_ends_the_other(lost, tmp_path):
    with Group(tmp_path, MEETING, "wait") as group:
        group.wait_for(lambda: all("waiting" in group.said(process) for process in (0, 1)))
        group.processes[lost].send_signal(signal.SIGKILL)
        assert group.processes[1 - lost].wait(DEADLINE_S) not in (0, -signal.SIGKILL)
    assert "another task died" in group.said(1 - lost)
