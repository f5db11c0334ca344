"""How two processes agree, vote and save: what each of them does in tests/test_processes.py."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from meeting import meet

from wan22_jax import processes, run_folder
from wan22_jax.checkpoint import FullDisk, list_steps, open_checkpoints, restore_state
from wan22_jax.errors import BadInput
from wan22_jax.model_tensors import GatheredTensors
from wan22_jax.stopping import Wish, listen
from wan22_jax.training.step import TrainState

VALUES = np.arange(32, dtype=np.float32).reshape(8, 4)
META = {"config": {}}


def agree() -> None:
    own = processes.index()
    assert processes.count() == jax.process_count() == 2
    assert processes.gather(own, "test") == [0, 1]
    assert processes.gather({"own": own + 1}, "test") == [{"own": 1}, {"own": 2}]
    assert processes.from_main(lambda: ["result", processes.index()], "result") == ["result", 0]
    with pytest.raises(BadInput, match=r"^no good$"):
        processes.from_main(_refuse, "raise")
    with pytest.raises(BadInput, match=r"^process 1: no good$"):
        processes.agree("no good" if own == 1 else None, "agree")
    array = _place(VALUES, PartitionSpec("all"))
    assert not processes.is_held(array)
    np.testing.assert_array_equal(processes.to_host(array), VALUES)
    assert processes.is_held(_place(VALUES, PartitionSpec()))
    tensors = GatheredTensors({"a": array, "b": 2 * array, "c": _place(VALUES, PartitionSpec())})
    if own == 0:  # it fails after the first one
        np.testing.assert_array_equal(tensors.read("a"), VALUES)
    tensors.finish()
    np.testing.assert_array_equal(tensors.read("c"), VALUES)
    vote()
    save()
    see()


def see() -> None:
    """A folder of the same name that is not the same is told from one that is shared."""
    run_folder.check_alike("lr = 1\nseed = 0")
    with pytest.raises(BadInput, match=r"other settings .* \(lr = 0\)"):
        run_folder.check_alike(f"lr = {processes.index()}\nseed = 0")
    run_folder.check_seen(Path("saving"))
    if processes.index() == 1:
        Path("elsewhere/saving").mkdir(parents=True)
        os.chdir("elsewhere")
    with (
        mock.patch.object(run_folder, "SEEN_S", 1),
        pytest.raises(BadInput, match=r"process 1: .*elsewhere/saving on .* that all hosts share"),
    ):
        run_folder.check_seen(Path("saving"))
    if processes.is_main():
        assert [path.name for path in Path("saving").iterdir()] == ["checkpoints"]


def vote() -> None:
    """A signal to one process, and a file that process 0 sees, are heard by both a step later."""
    folder = Path("voting")
    if processes.is_main():
        folder.mkdir()
    processes.gather(None, "made")
    with listen(folder) as wishes:
        assert wishes.read() == Wish(checkpoint=False, stop=False, late=False)
        processes.gather(None, "before")
        (folder / "save").touch()
        wishes.fulfil(wishes.read(), late=processes.index() == 1)
        if processes.index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert wishes.read() == Wish(checkpoint=True, stop=False, late=True)
        assert (folder / "save").exists()
        assert not wishes.ends_at_once()
        processes.gather(None, "seen")
        wishes.fulfil(wishes.read())
        assert wishes.read() == Wish(checkpoint=True, stop=True, late=False)
        processes.gather(None, "after")
        assert not (folder / "save").exists()


def save() -> None:
    """Sharded arrays are written by both; a disk that is full for one of them fails both."""
    async_save = ocp.StandardCheckpointHandler.async_save

    def fill(*args, **options):
        if processes.index() == 1:
            raise OSError(28, "No space left on device")
        return async_save(*args, **options)

    folder = Path("saving")
    if processes.is_main():
        folder.mkdir()
    with open_checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(1), META)
        checkpoints.wait()
        with mock.patch.object(ocp.StandardCheckpointHandler, "async_save", fill):
            checkpoints.save(make_state(2), META)
            with pytest.raises(FullDisk, match="the disk filled up"):
                checkpoints.wait()
        checkpoints.save(make_state(3), META)
        checkpoints.wait()
        assert sorted(list_steps(checkpoints.directory)) == [1, 3]
        for spec in (PartitionSpec("all"), PartitionSpec(None, "all"), PartitionSpec()):
            like = make_state(0, spec=spec)
            state, _ = restore_state(checkpoints, like)
            assert int(state.step) == 3
            assert state.trainable["w"].sharding == like.trainable["w"].sharding
            np.testing.assert_array_equal(processes.to_host(state.trainable["w"]), 3 + VALUES)


def make_state(step: int, *, spec: PartitionSpec = PartitionSpec("all")) -> TrainState:  # noqa: B008
    return TrainState(
        _place(np.int32(step), PartitionSpec()),
        {"w": _place(step + VALUES, spec)},
        {
            "m": _place(step * VALUES, PartitionSpec()),
            "count": _place(np.int32(1), PartitionSpec()),
        },
    )


def _refuse() -> None:
    assert processes.is_main()
    raise BadInput("no good")


def _place(values: np.ndarray, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), spec)
    return jax.make_array_from_callback(np.shape(values), sharding, lambda index: values[index])


if __name__ == "__main__":
    sys.exit(meet(agree))
