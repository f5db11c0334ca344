"""A full fine-tuning as a user runs it: train, stop, go on, export, load what was exported."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_train import CONFIG, compiled, folder, only_run  # noqa: F401

from convert import export
from wan22_jax import train
from wan22_jax.adapter import load_adapter
from wan22_jax.checkpoint import read_trainable
from wan22_jax.config import load_config
from wan22_jax.errors import BadInput
from wan22_jax.model_folder import load_transformer, read_model_card
from wan22_jax.weights import is_stacked, official_names
from wan22_jax.weights import load_transformer as load_files

FULL = CONFIG.replace("[adapter]\nrank = 2\n", "[full]\noffload_optimizer = true\n")


def run(*flags: str) -> int:
    return train.main(["--config", "full.toml", "max_steps=2", *flags])


def named(model) -> dict[str, np.ndarray]:
    arrays = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, array = ".".join(map(str, path)), np.asarray(leaf[...])
        for layer, official in enumerate(official_names(name, array.shape)):
            arrays[official] = array[layer] if is_stacked(name) else array
    return arrays


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_what_a_full_fine_tuning_exports_is_what_it_trained(capsys):
    Path("full.toml").write_text(FULL)
    assert run() == 0
    said = capsys.readouterr().out
    weights, meta = read_trainable(only_run())
    count = sum(array.size for array in weights.values())
    assert f"memory: {count:,} weights train: float32 weights" in said
    assert "in host memory" in said
    assert (meta["targets"], meta["step"]) == (None, 2)
    start = named(load_transformer(Path("model"), dtype="float32", host=True))
    assert weights.keys() == start.keys()
    assert all(np.any(weights[name] != start[name]) for name in weights)

    source = ["--checkpoint", str(only_run()), "--model", "model"]
    for dtype in ("float32", "bfloat16"):
        out = Path(f"{dtype}.safetensors")
        assert export.main([*source, "--dtype", dtype, "--out", str(out)]) == 0
        card = read_model_card(Path("model"))
        read = named(load_files(out, card.transformer, dtype=dtype))
        assert export.main([*source, "--dtype", dtype, "--out", dtype]) == 0
        exported = named(load_transformer(Path(dtype), host=True))
        for name, array in weights.items():
            want = array.astype(exported[name].dtype)
            np.testing.assert_array_equal(np.asarray(read[name]), want, err_msg=name)
            np.testing.assert_array_equal(exported[name], want, err_msg=name)
        new = read_model_card(Path(dtype))
        assert new.digests["transformer"] != card.digests["transformer"]
        assert new.digests["vae"] == card.digests["vae"]
    capsys.readouterr()
    assert export.main([*source, "--out", "float32"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert export.main([*source[:2], "--out", "folder"]) == 0  # the config says where the base is
    assert "forward pass: relative error" in capsys.readouterr().out
    with pytest.raises(BadInput, match="holds all weights of a model, not a LoRA"):
        load_adapter(only_run())


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("model.transformer_dtype='float8'", "transformer_dtype = 'float8' is that of frozen"),
        ("blocks_to_swap=3", "blocks_to_swap = 3 moves frozen weights"),
        ("activation_checkpointing='unsloth'", "'unsloth' keeps activations in host memory"),
        ("full.rounding='kahan'", "rounding is that of bfloat16 weights"),
        ("adapter.rank=4", "[full] trains all weights, [adapter] a few"),
    ],
)
def test_what_full_fine_tuning_cannot_do_is_refused(tmp_path, extra, complaint):
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    with pytest.raises(BadInput) as refusal:
        load_config(path, [extra])
    assert complaint in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_bfloat16_weights_need_a_bfloat16_model(tmp_path):
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    with pytest.raises(BadInput, match="needs \\[model\\] dtype = 'bfloat16'"):
        load_config(path, ["full.weights='bfloat16'", "model.dtype='float32'"])
    assert load_config(path, ["full.weights='bfloat16'", "full.rounding='kahan'"]).full is not None
