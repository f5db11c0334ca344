"""Runs with everything on at once stop, go on and end alike: a LoRA, and all weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import CONFIG, digest_state, keep_programs, prepare

from convert import export
from wan22_jax import train
from wan22_jax.adapter import load_adapter
from wan22_jax.checkpoint import read_trainable

EVERYTHING = """
ema_decay = 0.5
i2v_fraction = 0.5
skip_nonfinite_steps = false
eval_every_n_steps = 2
eval_datasets = [{name = 'held_out', config = 'held_out.toml'}]
"""
LORA = EVERYTHING + CONFIG.replace(
    "dtype = 'float32'", "dtype = 'bfloat16'\ntransformer_dtype = 'float8'"
).replace(
    "rank = 2\n",
    """
rank = 2
alpha = 6
dropout = 0.2
dtype = 'float32'
exclude_modules = ['o']
[[adapter.targets]]
pattern = '.*attn\\.[qkv]'
rank = 3
lr = 3e-2
[[adapter.targets]]
pattern = '.*'
""",
).replace("[optimizer]", "[optimizer]\ntype = 'lion'")
FULL = EVERYTHING + CONFIG.replace("dtype = 'float32'", "dtype = 'bfloat16'").replace(
    "[adapter]\nrank = 2\n", "[full]\nweights = 'bfloat16'\noffload_optimizer = true\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
    shutil.copytree(folder / "clips", folder / "others")
    dataset = (folder / "dataset.toml").read_text()
    (folder / "held_out.toml").write_text(dataset.replace("'clips'", "'others'"))
    (folder / "lora.toml").write_text(LORA)
    (folder / "full.toml").write_text(FULL)
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder


def run(config: str, output_dir: str, *flags: str) -> Path:
    assert train.main(["--config", config, f"output_dir='{output_dir}'", *flags]) == 0
    (run_dir,) = Path(output_dir).iterdir()
    return run_dir


@pytest.mark.long
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("config", ["lora.toml", "full.toml"])
def test_a_run_with_everything_on_ends_as_if_it_had_not_stopped(config, capsys):
    whole = run(config, "whole", "max_steps=5")
    said = capsys.readouterr().out
    assert said.count("evaluation loss") >= 2
    assert sorted(path.name for path in whole.glob("*.toml")) == [
        "dataset.toml", *sorted([config, "held_out.toml"])
    ]  # fmt: skip
    parts = run(config, "parts", "max_steps=3")
    assert run(config, "parts", "max_steps=5", "--resume_from_checkpoint") == parts
    assert digest_state(parts) == digest_state(whole, 5)
    raw, meta = read_trainable(whole)
    average, _ = read_trainable(whole, ema=True)
    assert raw.keys() == average.keys()
    assert meta["step"] == 5
    assert any(np.any(np.asarray(raw[name]) != np.asarray(average[name])) for name in raw)


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_targets_dropout_averages_and_a_lora_to_start_from(capsys):
    run_dir = run("lora.toml", "first", "max_steps=2")
    raw, average = (Path(f"{name}.safetensors") for name in ("raw", "average"))
    for out, flags in ((raw, []), (average, ["--ema"])):
        assert export.main(["--checkpoint", str(run_dir), "--out", str(out), *flags]) == 0
    adapter = load_adapter(raw)
    attention = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkv"]
    assert adapter.ranks == dict.fromkeys(attention, 3) | {"ffn.0": 2, "ffn.2": 2}
    assert adapter.alphas == dict.fromkeys(attention, 3.0) | {"ffn.0": 6.0, "ffn.2": 6.0}
    assert any(np.any(load_adapter(average).matrices[name] != adapter.matrices[name])
               for name in adapter.matrices)  # fmt: skip
    # Lion moves every number by its learning rate, at most: those of q, k and v have another one.
    start = read_trainable(run("lora.toml", "start", "max_steps=1"))[0]
    moved = {name: np.abs(array).max() for name, array in start.items() if "lora_B" in name}
    for name, distance in moved.items():
        assert (distance > 1.5e-2 / 3) == ("attn" in name), (name, distance)

    capsys.readouterr()
    second = run(
        "lora.toml",
        "second",
        "max_steps=1",
        "adapter.init_from_existing='raw.safetensors'",
        "optimizer.lr=1e-12",
    )
    assert "adapter: starts from raw.safetensors" in capsys.readouterr().out
    started = read_trainable(second)[0]
    for name in ("blocks.ffn.0.lora_B", "blocks.ffn.2.lora_A"):
        np.testing.assert_allclose(started[name], adapter.matrices[name], rtol=0, atol=1e-7)
