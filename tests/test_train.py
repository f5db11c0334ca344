"""wan22-train as a user runs it: new runs, resumed runs, killed runs and full disks."""

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from convert.weights import convert
from wan22_jax import train
from wan22_jax.checkpoint import FOLDER, read_trainable
from wan22_jax.data.cache import (
    CACHE_FOLDER,
    ClipEntry,
    make_latents_key,
    make_text_key,
    name_encoders,
    open_writer,
)
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, write_checkpoint
from wan22_jax.geometry import LATENT_CHANNELS, Bucket
from wan22_jax.model_folder import read_model_card

BUCKET = Bucket(32, 32, 5)
CLIPS = 3  # a step each
CONFIG = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 2
checkpoint_every_n_steps = 2
[model]
ckpt_path = 'model'
[adapter]
rank = 2
[optimizer]
lr = 1e-2
"""
DATASET = f"size_buckets = [{list(BUCKET)}]\n[[directory]]\npath = 'clips'\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a tiny model, a cache of random latents and the two config files."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "lora.toml").write_text(CONFIG)
    (folder / "dataset.toml").write_text(DATASET)
    write_checkpoint(folder / "checkpoint", captions=["a cat"])
    card = convert(folder / "checkpoint", folder / "model")
    rng = np.random.default_rng(0)
    entries = []
    encoders = name_encoders(card.digests)
    with open_writer(folder / "clips" / CACHE_FOLDER, encoders=encoders) as writer:
        for number in range(CLIPS):
            entry = ClipEntry(
                f"{number}.mp4", BUCKET, make_latents_key(f"{number}", BUCKET), make_text_key("")
            )
            latents = rng.standard_normal((*BUCKET.latent_TYX, LATENT_CHANNELS), np.float32)
            writer.add(entry.latents_key, latents)
            entries.append(entry)
        writer.add(make_text_key(""), rng.standard_normal((3, TINY_TEXT_ENCODER.dim), np.float32))
        writer.finish(entries, buckets=[BUCKET])
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    """The prepared files in a folder of the test's own, which is the working directory."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags: str) -> int:
    return train.main(["--config", "lora.toml", *flags])


def only_run(output_dir: str = "runs") -> Path:
    (run_dir,) = Path(output_dir).iterdir()
    return run_dir


def list_checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / FOLDER).iterdir())


@pytest.mark.usefixtures("here")
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(capsys):
    assert run("output_dir=whole") == 0
    assert run("max_steps=4") == 0
    unfinished = only_run() / FOLDER / "5.orbax-checkpoint-tmp" / "trainable"
    unfinished.mkdir(parents=True)  # what a kill in the middle of a save leaves
    capsys.readouterr()
    assert run("--resume_from_checkpoint") == 0
    assert "4 steps done, of 6" in capsys.readouterr().out
    assert list_checkpoints(only_run()) == ["2", "4", "6"]
    whole, _ = read_trainable(only_run("whole"))
    resumed, meta = read_trainable(only_run())
    assert meta["step"] == 6
    assert any(np.any(matrix) for name, matrix in whole.items() if name.endswith("lora_B"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name])
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "max_steps=5") == 0  # fewer than are done
    said = capsys.readouterr().out
    assert "nothing is left to do" in said
    assert "done: 6 steps" in said


def test_resuming_passes_over_a_run_without_checkpoint(here, capsys):
    assert run("max_steps=2") == 0
    (here / "runs" / "99991231_23-59-59" / FOLDER).mkdir(parents=True)  # killed before the first
    assert run("--resume_from_checkpoint", "max_steps=3") == 0
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "99991231_23-59-59") == 2
    assert "is not a run folder with checkpoints" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_another_base_model_or_adapter_is_not_resumed(monkeypatch, capsys):
    assert run("max_steps=1") == 0
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "adapter.rank=4") == 2
    assert "was trained with rank 2, the config has 4" in capsys.readouterr().err
    card = read_model_card(Path("model"))
    other = dataclasses.replace(card, digests=card.digests | {"transformer": "another"})
    monkeypatch.setattr(train, "read_model_card", lambda _: other)
    assert run("--resume_from_checkpoint") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"was trained with base model {card.digests['transformer']}" in error
    assert "the config has another; resume with the original or start a new run" in error


@pytest.mark.usefixtures("here")
def test_a_full_disk_leaves_complete_checkpoints_and_one_line(monkeypatch, capsys):
    disk_usage = shutil.disk_usage

    def fill_up(path):
        return disk_usage(path)._replace(free=0 if list(Path(path).glob("2")) else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", fill_up)
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"checkpoints/4: a checkpoint takes 0\.\d MB, the disk has 0\.0 MB free", error
    )
    assert "--resume_from_checkpoint" in error
    assert list_checkpoints(only_run()) == ["2"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["save", "log"])
def test_a_disk_that_fills_up_midway(where, monkeypatch, capsys):
    text = "No space left on device"

    def fail(*_args, **_options):
        if where == "save":
            (only_run() / FOLDER / "2.orbax-checkpoint-tmp").mkdir()
            raise ValueError(f"RESOURCE_EXHAUSTED: {text} [os_error_code='28']")  # TensorStore's
        raise OSError(28, text)

    if where == "save":
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
    else:
        monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", fail)
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{FOLDER}: the disk filled up; free some space" in error
    assert not [name for name in list_checkpoints(only_run()) if "tmp" in name]


@pytest.mark.usefixtures("here")
def test_two_runs_in_one_second_have_two_folders(monkeypatch):
    monkeypatch.setattr(train.time, "sleep", lambda _: shutil.move("runs/now", "runs/before"))
    monkeypatch.setattr(train, "datetime", SimpleNamespace(now=lambda _: Clock()))
    for _ in range(2):
        train._make_run_dir(Path("runs"))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["before", "now"]


class Clock:
    """A time that always reads the same."""

    def strftime(self, _: str) -> str:
        return "now"
