"""deterministic = true: the form that a GPU can compute deterministically, and what it cannot."""

import jax
import numpy as np
import pytest
from tiny_run import prepare

from wan22_jax import start, train
from wan22_jax.checkpoint import read_trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


def run(*settings):
    return train.main(["--config", "lora.toml", "deterministic=true", *settings])


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_blocks_run_in_a_loop_and_train_the_same(tmp_path, monkeypatch):
    asked = []

    def place_frozen(*args, **options):
        asked.append(options["in_loop"])
        return start_place(*args, **options)

    start_place = start.place_frozen
    monkeypatch.setattr(start, "place_frozen", place_frozen)
    trained = []
    for in_loop in (False, True):
        monkeypatch.setattr(start, "_wants_loop", lambda _, on=in_loop: on)
        assert run("max_steps=2", f"output_dir=run{in_loop}") == 0
        (folder,) = (tmp_path / f"run{in_loop}").iterdir()
        trained.append(read_trainable(folder)[0])
    assert asked == [False, True]
    for name, expected in trained[0].items():
        np.testing.assert_allclose(trained[1][name], expected, atol=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("blocks_to_swap=1", "blocks_to_swap = 1"),
        ("activation_checkpointing=unsloth", "activation_checkpointing = 'unsloth'"),
    ],
)
def test_a_gpu_does_not_stream_deterministically(setting, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run(setting, "epochs=1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "a GPU cannot do both yet" in line
    assert not (tmp_path / "runs").exists()
