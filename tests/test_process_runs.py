"""wan22-train in several processes: one writes, all stop together, and a run survives a loss."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny_run
from test_processes import DEADLINE_S, ROOT, Group

from wan22_jax.checkpoint import FOLDER, find_damage, list_steps, read_arrays, read_meta
from wan22_jax.geometry import Bucket

STEPS, MANY_STEPS = 6, 60
SETTINGS = (
    f"max_steps={STEPS}",
    "epochs=1000",
    "gradient_accumulation_steps=1",
    "global_batch_size=4",
)
PROGRAM = "import sys; from wan22_jax.train import main; sys.exit(main())"  # as wan22-train
TRAIN = ("-c", PROGRAM, "--config", "lora.toml", *SETTINGS)
FULL = """
activation_checkpointing = true
ema_decay = 0.9
eval_datasets = ['dataset.toml']
eval_every_n_steps = 2
keep_last_n_checkpoints = 2
keep_best_checkpoint = true
save_dtype = 'float32'
save_every_n_steps = 2
"""
SAMPLE = """
[sample]
prompts = ['a cat --w 32 --h 32 --f 5 --s 1']
every_n_steps = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, cache of one bucket and configs; programs are compiled once."""
    folder = tmp_path_factory.mktemp("tiny")
    bucket = Bucket(32, 32, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "BUCKETS", {bucket: 8})
        patch.setattr(tiny_run, "DATASET", tiny_run.DATASET.replace(", [32, 64, 5]", ""))
        tiny_run.prepare(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
        yield folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """An uninterrupted run of one process."""
    train_alone(folder, "output_dir=whole")
    return only_run(folder / "whole")


def train_alone(folder: Path, *flags: str, program: Sequence[str] = TRAIN) -> str:
    done = subprocess.run(
        [sys.executable, *program, *flags],
        cwd=folder,
        env=os.environ
        | {
            "XLA_FLAGS": re.sub("device_count=[0-9]+", "device_count=1", os.environ["XLA_FLAGS"]),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def only_run(folder: Path) -> Path:
    (run_dir,) = folder.iterdir()
    return run_dir


def steps_of(folder: Path) -> list[int]:
    return sorted(step for path in folder.glob(f"*/{FOLDER}") for step in list_steps(path))


def check_same_end(run_dir: Path, whole: Path, *, step: int = STEPS) -> None:
    """Up to what another order of additions changes."""
    found, expected = (path / FOLDER / str(step) for path in (run_dir, whole))
    assert find_damage(found) is None
    for item, described in read_meta(expected)["arrays"].items():
        arrays = read_arrays(found, item, described)
        for name, array in read_arrays(expected, item, described).items():
            np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_writes_and_when_it_is_lost_the_run_goes_on_alone(folder, whole):
    with Group(folder, *TRAIN, "output_dir=lost", "max_steps=1000") as group:
        group.wait_for(lambda: 3 in steps_of(folder / "lost"))
        group.processes[0].send_signal(signal.SIGKILL)
        assert group.processes[1].wait(DEADLINE_S) not in (0, -signal.SIGKILL)
    assert "2 processes train together" in group.said(0)
    assert "step 2: saving " in group.said(0)
    assert "saving" not in group.said(1)
    assert "another task died" in group.said(1)
    run_dir = only_run(folder / "lost")
    assert len(list(run_dir.glob("events.*"))) == 1
    for step in set(steps_of(folder / "lost")) - {1, 2, 3}:  # it was killed somewhat later
        shutil.rmtree(run_dir / FOLDER / str(step))
    said = train_alone(folder, "output_dir=lost", "--resume_from_checkpoint")
    assert f"{run_dir.name}: 3 steps done, of {STEPS}" in said, said
    check_same_end(run_dir, whole)


@pytest.mark.long
def test_a_signal_to_one_ends_both_after_the_same_step(folder):
    keys = ("output_dir=stopped", "checkpoint_every_n_steps=100", "max_steps=1000")
    with Group(folder, *TRAIN, *keys, "steps_per_print=1") as group:
        group.wait_for(lambda: "step 2/1000" in group.said(0))
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.codes() == [0, 0], group.said()
    (step,) = steps_of(folder / "stopped")
    assert f"done: {step} steps" in group.said(0)
    assert "SIGTERM: finishing the step" in group.said(1)
    with Group(folder, *TRAIN, *keys, f"max_steps={step + 2}", "--resume_from_checkpoint") as group:
        assert group.codes() == [0, 0], group.said()
    assert f"{step} steps done, of {step + 2}" in group.said(0)


@pytest.mark.long
def test_killed_at_random_moments_with_other_numbers_of_processes_a_run_ends_alike(folder):
    rng = random.Random(0)
    keys = (f"max_steps={MANY_STEPS}", "optimizer.lr=1e-3", "save_every_n_steps=7")
    train_alone(folder, *keys, "output_dir=long")
    for number in (4, 2, 4, 1, 2, 4):
        before = max(steps_of(folder / "random"), default=0)
        resume = ("--resume_from_checkpoint",) if before else ()
        with Group(folder, *TRAIN, *keys, *resume, "output_dir=random", number=number) as group:
            group.wait_for(
                lambda before=before: max(steps_of(folder / "random"), default=0) > before
            )
            time.sleep(rng.random())
            victim = rng.randrange(number)
            group.processes[victim].send_signal(signal.SIGKILL)
            codes = group.codes()
            assert codes[victim] == -signal.SIGKILL, group.said()
            assert 0 not in codes, group.said()
    with Group(folder, *TRAIN, *keys, "--resume_from_checkpoint", "output_dir=random") as group:
        assert group.codes() == [0, 0], group.said()
    (run_dir,) = (path.parent for path in folder.glob(f"random/*/{FOLDER}") if list_steps(path))
    check_same_end(run_dir, only_run(folder / "long"), step=MANY_STEPS)


@pytest.mark.long
def test_weights_that_are_divided_among_processes_are_evaluated_shown_saved_and_exported(folder):
    config = (folder / "lora.toml").read_text().replace("[adapter]\nrank = 2\n", SAMPLE)
    (folder / "full.toml").write_text(FULL + config.replace("lr = 1e-2", "lr = 1e-3\neps = 0.01"))
    full = ("-c", PROGRAM, "--config", "full.toml", *SETTINGS, "max_steps=3")
    with Group(folder, *full, "output_dir=divided") as group:
        assert group.codes() == [0, 0], group.said()
    assert "data 1 x fsdp 2 x context 1" in group.said(0)
    divided = only_run(folder / "divided")
    assert (divided / "samples" / "step00000002" / "00.mp4").is_file()
    train_alone(folder, "output_dir=undivided", program=full)
    undivided = only_run(folder / "undivided")
    check_same_end(divided, undivided, step=3)
    for step in (2, 3):
        found, expected = (
            safetensors.numpy.load_file(run_dir / f"step{step}" / "model.safetensors")
            for run_dir in (divided, undivided)
        )
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
