"""A run that stops and goes on equals one that does not, bit for bit; and what may start anew."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import STEPS_PER_EPOCH, digest_state, keep_programs, prepare

from wan22_jax import train
from wan22_jax.checkpoint import FOLDER, find_damage, list_steps
from wan22_jax.resuming import Reset, choose_start, list_changes, restart_schedules


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Model, cache and configs; what is compiled is kept beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """An uninterrupted run with a checkpoint of every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run() == 0
    (run_dir,) = (folder / "runs").iterdir()
    assert max(list_steps(run_dir / FOLDER)) == 2 * STEPS_PER_EPOCH
    return run_dir


def run(*flags: str) -> int:
    return train.main(["--config", "lora.toml", *flags])


def only_run() -> Path:
    (run_dir,) = Path("runs").iterdir()
    return run_dir


@pytest.mark.usefixtures("here")
def test_a_run_that_stops_anywhere_ends_alike(whole):
    """Accumulation, two buckets, dropped captions; in mid-epoch and at an epoch's end."""
    every = "checkpoint_every_n_steps=100"  # only what an end of the run writes
    assert run(every, "max_steps=2") == 0
    for stop in (STEPS_PER_EPOCH, 5, 2 * STEPS_PER_EPOCH):
        assert run(every, f"max_steps={stop}", "--resume_from_checkpoint") == 0
        assert digest_state(only_run()) == digest_state(whole, stop)
    assert digest_state(whole, 7)[1] != digest_state(whole, 8)[1]
    exports = [f"{name}/adapter_model.safetensors" for name in ("step2", "epoch1", "step5")]
    assert all((only_run() / name).is_file() for name in exports)


@pytest.mark.long
def test_killed_at_random_moments_a_run_ends_alike():
    program = [sys.executable, str(Path(__file__).with_name("kill_run.py")), "--kills", "4"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run ended alike" in done.stdout


@pytest.mark.usefixtures("here")
def test_a_damaged_checkpoint_is_passed_over(whole, capsys):
    assert run("max_steps=3") == 0
    folder = only_run() / FOLDER
    files = [path for path in (folder / "3").rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert find_damage(folder / "3") is not None, path
        path.write_bytes(content)
    assert find_damage(folder / "3") is None
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "max_steps=4") == 0
    said = capsys.readouterr().out
    assert f"{folder / '3'} is damaged ({largest} has other bytes than were written)" in said
    assert f"it is called 3.damaged now, and the run goes on from {folder / '2'}" in said
    assert digest_state(only_run()) == digest_state(whole, 4)
    assert sorted(list_steps(folder)) == [1, 2, 3, 4]  # written anew
    for step in (1, 2, 3, 4):
        (folder / str(step) / "meta.json").write_text("{")
    assert run("--resume_from_checkpoint") == 2
    assert "no checkpoint is sound" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_resets(whole, capsys):
    assert run("--reset_dataloader") == 2
    assert "add --resume_from_checkpoint" in capsys.readouterr().err
    assert run("max_steps=3", "checkpoint_every_n_steps=100") == 0
    resume = ("--resume_from_checkpoint", "checkpoint_every_n_steps=100")
    assert run(*resume, "--reset_dataloader", "max_steps=4") == 0
    # Step 4 took the first batch again, and the second epoch ends three steps later.
    assert digest_state(only_run()) != digest_state(whole, 4)
    assert run(*resume) == 0
    assert digest_state(only_run())[0] == 2 * STEPS_PER_EPOCH + 3
    assert (only_run() / "epoch2").is_dir()
    capsys.readouterr()
    assert run(*resume, "epochs=3", "--reset_optimizer", "optimizer.lr=1e-3", "max_steps=12") == 0
    assert "config.optimizer.lr 0.01 -> 0.001" in capsys.readouterr().out


def test_where_a_run_goes_on():
    saved = {"step": 6, "data_offset": 0, "steps_per_epoch": 4, "schedule_start": 1}

    def start(steps_per_epoch: int = 4, *, batch: int = 2, **reset: bool) -> tuple[int, ...]:
        return choose_start(
            saved, steps_per_epoch=steps_per_epoch, global_batch=batch, reset=Reset(**reset)
        )

    assert start() == (6, 0, 1)
    assert start(dataloader=True) == (6, -2, 1)  # epoch 2 begins at batch 4
    assert start(optimizer=True) == start(optimizer_params=True) == (6, 0, 6)
    # Other data: two steps into the second epoch, as it is now.
    assert start(10) == (6, 6, 1)
    assert start(1) == (6, -4, 1)  # the second epoch has no third step: the next epoch
    # Other steps, of more GPUs or fewer: half of the second epoch is behind us.
    saved |= {"global_batch": 2}
    assert start(10) == (6, 6, 1)
    assert start(2, batch=4) == (6, -3, 1)
    assert start(3, batch=3) == (6, -2, 1)  # what is not whole steps is taken again
    assert start(8, batch=1) == (6, 6, 1)
    assert start(2, batch=4, dataloader=True) == (6, -4, 1)
    saved |= {"step": 8}
    assert start(2, batch=4) == (8, -4, 1)
    assert start(dataloader=True) == start()  # at an epoch's end there is nothing to repeat


def test_schedules_restart_and_moments_stay():
    weights = {"w": jnp.ones(3)}
    optimizer = optax.adamw(optax.linear_schedule(0.0, 1.0, 10))
    state = optimizer.init(weights)
    for _ in range(3):
        _, state = optimizer.update(weights, state, weights)
    restarted = restart_schedules(state)
    adam, schedule = restarted[0], restarted[-1]
    assert (int(adam.count), int(schedule.count), int(state[-1].count)) == (3, 0, 3)
    np.testing.assert_array_equal(adam.mu["w"], state[0].mu["w"])


def test_what_has_changed_is_listed():
    saved = {
        "config": {"lr": 1e-4, "model": {"shift": 3.0}},
        "dataset": {"directory": [{"path": "a"}]},
        "steps_per_epoch": 3,
        "step": 7,
    }
    now = {
        "config": {"lr": 1e-4, "model": {"shift": 5.0}, "seed": 1},
        "dataset": {"directory": [{"path": "a"}, {"path": "b"}]},
        "steps_per_epoch": 3,
    }
    assert list_changes(saved, saved) == []
    assert list_changes(saved, now) == [
        "config.model.shift 3.0 -> 5.0",
        "config.seed None -> 1",
        "dataset.directory[1].path None -> b",
    ]
