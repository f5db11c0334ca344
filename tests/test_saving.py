"""What a run writes while it goes: on signals and wishes, on full disks, after bad losses."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_run import DATASET, STEPS_PER_EPOCH, digest_state, keep_programs, prepare, write_cache

from wan22_jax import train
from wan22_jax.adapter import load_adapter
from wan22_jax.checkpoint import FOLDER, list_steps, open_checkpoints, read_trainable
from wan22_jax.config import load_config
from wan22_jax.model_folder import read_model_card
from wan22_jax.training.metrics import Progress

BROKEN = "2_32x64"
RARE = "checkpoint_every_n_steps=100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Model, cache and configs, of which ``broken`` has a clip with NaNs."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
    write_cache(folder / "broken", read_model_card(folder / "model").digests, broken=BROKEN)
    (folder / "broken.toml").write_text(DATASET.replace("'clips'", "'broken'"))
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder


def run(*flags: str) -> int:
    return train.main(["--config", "lora.toml", *flags])


def only_run() -> Path:
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def ask(name: str) -> None:
    (only_run() / name).touch()


def steps_of(run_dir: Path) -> list[int]:
    return sorted(list_steps(run_dir / FOLDER))


def after_step(number: int, action: Callable[[], object], monkeypatch) -> None:
    """Has the action done while this step is under way."""
    push = Progress.push

    def watched(self, report, **options):
        push(self, report, **options)
        if report.step == number:
            action()

    monkeypatch.setattr(Progress, "push", watched)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number, monkeypatch, capfd):
    before = signal.getsignal(number)
    after_step(2, lambda: os.kill(os.getpid(), number), monkeypatch)
    assert run(RARE) == 0
    said = capfd.readouterr()
    assert f"{signal.Signals(number).name}: finishing the step and saving" in said.err
    assert "done: 2 steps" in said.out
    assert steps_of(only_run()) == [2]
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("here")
def test_a_second_signal_ends_the_run_at_once():
    script = (
        "import os, signal, threading\nfrom pathlib import Path\n"
        "from wan22_jax.stopping import listen\n"
        "with listen(Path('.')) as wishes:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    assert wishes.read().stop\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('not reached')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "not reached" not in done.stdout


@pytest.mark.usefixtures("here")
def test_files_in_the_run_folder_ask_for_a_checkpoint(monkeypatch):
    with monkeypatch.context() as patch:
        after_step(2, lambda: ask("save"), patch)
        assert run(RARE, "max_steps=3") == 0
    assert steps_of(only_run()) == [2, 3]
    (only_run() / "save_quit").touch()  # stale: nobody wants the next run to end
    (only_run() / "save").touch()
    with monkeypatch.context() as patch:
        after_step(5, lambda: ask("save_quit"), patch)
        assert run(RARE, "--resume_from_checkpoint") == 0
    assert steps_of(only_run()) == [2, 3, 5]
    assert not list(only_run().glob("save*"))


@pytest.mark.usefixtures("here")
def test_the_last_checkpoints_stay_and_exports_are_the_run_at_that_step():
    keys = ("keep_last_n_checkpoints=2", "keep_every_n_steps=3", "save_every_n_steps=2")
    assert run(*keys, "save_dtype=float32", "max_steps=5") == 0
    assert steps_of(only_run()) == [3, 4, 5]
    folders = {path.name for path in only_run().iterdir() if path.is_dir()}
    assert folders == {FOLDER, "step2", "step4", "step5"}
    for step in (4, 5):
        exported = load_adapter(only_run() / f"step{step}" / "adapter_model.safetensors")
        trained, _ = read_trainable(only_run(), step)
        assert exported.metadata["step"] == str(step)
        for name, matrix in trained.items():
            np.testing.assert_array_equal(exported.matrices[name], matrix)
    assert load_config(only_run() / "step4" / "lora.toml").save_dtype == "float32"
    # A killed run writes it again, whatever lies there.
    (only_run() / "step5" / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(only_run() / FOLDER / "5")
    assert run(*keys, "save_dtype=float16", "max_steps=5", "--resume_from_checkpoint") == 0
    content = (only_run() / "step5" / "adapter_model.safetensors").read_bytes()
    assert {tensor.dtype for tensor in safetensors.numpy.load(content).values()} == {
        np.dtype("float16")
    }


@pytest.mark.usefixtures("here")
def test_the_best_checkpoint_is_written_and_stays(monkeypatch):
    Path("eval.toml").write_text(DATASET)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 1.5}
    monkeypatch.setattr(train, "evaluate", lambda _evaluator, _state, _progress, step: losses[step])
    keys = ("eval_datasets=['eval.toml']", "eval_every_n_steps=1", "eval_before_first_step=false")
    keys += ("keep_best_checkpoint=true", "keep_last_n_checkpoints=1", RARE)
    assert run(*keys, "max_steps=4") == 0
    assert steps_of(only_run()) == [2, 4]
    assert run(*keys, "max_steps=5", "--resume_from_checkpoint") == 0
    assert steps_of(only_run()) == [2, 5]  # 1.5 is less than 4, but more than 1


@pytest.mark.usefixtures("here")
def test_a_disk_full_for_a_while_costs_a_checkpoint_and_not_the_run(monkeypatch, capsys):
    disk_usage = shutil.disk_usage
    full = [False]
    after_step(3, lambda: full.__setitem__(0, True), monkeypatch)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=0 if full[0] else 10**9)
    )
    fsync = os.fsync

    def sync(file):
        if full[0] and "adapter_model" in os.readlink(f"/proc/self/fd/{file}"):
            full[0] = False  # until here: the adapter of step 4 is not written either
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    assert run("save_every_n_steps=4", "max_steps=5") == 0
    said = capsys.readouterr().out
    assert re.search(r"/3: a checkpoint takes \d\.\d MB, the disk has 0\.0 MB free", said)
    assert "step4: was not saved (the disk is full)" in said
    assert said.count("training goes on, the next save tries again") == 2
    assert steps_of(only_run()) == [1, 2, 4, 5]
    assert not (only_run() / "step4").exists()
    full[0] = True
    after_step(6, lambda: full.__setitem__(0, True), monkeypatch)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run("max_steps=6", "--resume_from_checkpoint") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoints/6: a checkpoint takes" in error
    assert "free some space" in error
    assert steps_of(only_run()) == [1, 2, 4, 5]


@pytest.mark.usefixtures("here")
def test_a_disk_that_fills_up_during_a_save(monkeypatch, capsys):
    """TensorStore's own error, in the background; the next save has new threads."""
    from orbax.checkpoint import AsyncCheckpointer

    wait = AsyncCheckpointer.wait_until_finished
    failures = iter([True])

    def fail(self):
        wait(self)
        if next(failures, False):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    monkeypatch.setattr(AsyncCheckpointer, "wait_until_finished", fail)
    assert run("max_steps=3") == 0
    assert f"{FOLDER}: the disk filled up; training goes on" in capsys.readouterr().out
    assert 3 in steps_of(only_run())
    assert len(steps_of(only_run())) == 2
    assert all(path.name.isdigit() for path in (only_run() / FOLDER).iterdir())


@pytest.mark.usefixtures("here")
def test_curves_that_a_full_disk_does_not_take_do_not_end_the_run(monkeypatch, capsys):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", fail)
    assert run("max_steps=2") == 0
    assert capsys.readouterr().out.count("curves are not written, training goes on") == 1
    assert steps_of(only_run()) == [1, 2]


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_loss_that_is_not_finite_ends_the_run_or_changes_nothing(capsys):
    assert run("dataset=broken.toml") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"the loss of step (\d+) is nan \(clips: ([^)]*)\); lower lr", error)
    assert found is not None, error
    bad, clips = int(found[1]), found[2].split(", ")
    assert f"{BROKEN}.mp4" in clips
    assert len(clips) == 2
    last = f"the last good checkpoint is {only_run().absolute() / FOLDER / str(bad - 1)}"
    assert (last if bad > 1 else "there is no checkpoint") in error
    assert steps_of(only_run()) == list(range(1, bad))
    shutil.rmtree("runs")
    last = STEPS_PER_EPOCH + 1
    assert run("dataset=broken.toml", "skip_nonfinite_steps=true", f"max_steps={last}") == 0
    assert f"the loss of step {bad} is nan" in capsys.readouterr().out
    digests = [digest_state(only_run(), step)[1] for step in range(1, last + 1)]
    changes = [old != new for old, new in pairwise(digests)]
    assert changes == [step != bad for step in range(2, last + 1)]


@pytest.mark.usefixtures("here")
def test_one_process_trains_a_run(capsys):
    assert run(RARE, "max_steps=1") == 0
    with open_checkpoints(only_run()):
        assert run("--resume_from_checkpoint") == 2
    assert "another process is training this run" in capsys.readouterr().err
    assert digest_state(only_run())[0] == 1
