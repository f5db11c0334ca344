"""wan22-train on several devices of one process: other numbers of them, and what is refused."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from wan22_jax import train
from wan22_jax.checkpoint import FOLDER, list_steps, read_arrays, read_meta
from wan22_jax.geometry import Bucket

STEPS = 4
SETTINGS = (
    "gradient_accumulation_steps=1",
    "global_batch_size=4",
    "activation_checkpointing=true",
    "optimizer.eps=0.01",  # what is next to zero shall not decide by its sign
    "steps_per_print=1",
    "epochs=100",
)
FOUR = ("parallel.data=2", "parallel.fsdp=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Model, cache of one bucket and config; its frames have one token each."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "BUCKETS", {Bucket(32, 32, 5): 10})
        patch.setattr(tiny_run, "DATASET", tiny_run.DATASET.replace(", [32, 64, 5]", ""))
        tiny_run.prepare(folder)
    with tiny_run.keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder


def run(*settings: str) -> int:
    return train.main(["--config", "lora.toml", *SETTINGS, *settings])


def read_losses(said: str) -> list[str]:
    return re.findall(r"step (\d+/\d+, epoch \d+/\d+, avr_loss [0-9.]+)", said)


def read_state(output_dir: str) -> dict[str, np.ndarray]:
    (folder,) = Path(output_dir).glob(f"*/{FOLDER}")
    newest = folder / str(max(list_steps(folder)))
    return {
        f"{item}/{name}": array
        for item, described in read_meta(newest)["arrays"].items()
        for name, array in read_arrays(newest, item, described).items()
    }


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_four_devices_goes_on_with_two_and_with_one(capsys):
    assert run(f"max_steps={STEPS}", "output_dir=whole") == 0
    expected = read_losses(capsys.readouterr().out)
    assert len(expected) == STEPS
    assert run("max_steps=3", "output_dir=two", *FOUR) == 0
    assert "devices: 4 x cpu: data 2 x fsdp 2 x context 1" in capsys.readouterr().out
    shutil.copytree("two", "one")
    # The run's own copy of the config starts it, too.
    (copy,) = Path("two").glob("*/lora.toml")
    resume = (f"max_steps={STEPS}", "--resume_from_checkpoint")
    assert run(*resume, "output_dir=one") == 0
    assert read_losses(capsys.readouterr().out) == expected[3:]
    two = ("parallel.data=1", "parallel.fsdp=1", "parallel.context=2")  # of which one has no token
    assert train.main(["--config", str(copy), *two, *resume]) == 0
    said = capsys.readouterr().out
    assert "devices: 2 x cpu: data 1 x fsdp 1 x context 2" in said
    assert read_losses(said) == expected[3:]
    whole = read_state("whole")
    for state in (read_state("one"), read_state("two")):
        assert state.keys() == whole.keys()
        for name, array in whole.items():
            np.testing.assert_allclose(state[name], array, atol=1e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_with_other_steps_a_run_goes_on_at_the_same_share_of_an_epoch(capsys):
    """Four of ten clips have trained, one a step; two a step are left six."""
    settings = ("micro_batch_size_per_gpu=1", "parallel.data=2")
    free = [one for one in SETTINGS if not one.startswith("global_batch_size")]
    start = ["--config", "lora.toml", *free, "output_dir=share"]
    assert train.main([*start, "max_steps=4"]) == 0
    capsys.readouterr()
    assert train.main([*start, *settings, "max_steps=8", "--resume_from_checkpoint"]) == 0
    said = capsys.readouterr().out
    assert "changed since the checkpoint: global_batch 1 -> 2" in said
    assert "changed since the checkpoint: steps_per_epoch 10 -> 5" in said
    epochs = re.findall(r"step (\d+)/8, epoch (\d+)/", said)
    assert epochs == [("5", "1"), ("6", "1"), ("7", "1"), ("8", "2")]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["parallel.data=0"], "key parallel.data: .* greater than or equal to 1, got 0"),
        (["parallel.fsdp=-1"], "key parallel.fsdp: .* got -1"),
        (["parallel.context=two"], 'key parallel.context: .* valid integer, got "two"'),
        (["parallel.data_parallel=2"], "key parallel.data_parallel, did you mean parallel.data?"),
        (["parallel=4"], "key parallel: .*table"),
        (["parallel.data=4", "parallel.fsdp=4"], "asks for 16 devices, there are 8"),
        (["parallel.context=5"], "context = 5: 2 attention heads do not divide so"),
        (["parallel.fsdp=5"], "fsdp = 5: matrices of 48 rows do not divide so"),
        (["parallel.fsdp=2", "activation_checkpointing=false"], "set activation_checkpointing ="),
        (["parallel.data=3"], "global_batch_size = 4: .* takes 3 clips .* a multiple of that"),
        (["gradient_accumulation_steps=2"], "leave out gradient_accumulation_steps"),
        (["--local-rank=0"], "--local_rank is of DeepSpeed's launcher"),
        (["--deepspeed", "--num_gpus=4"], "--deepspeed is of DeepSpeed's launcher"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, problem, capsys):
    assert run(*settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(problem.replace("?", r"\?"), line), line
    assert not Path("runs").exists()
