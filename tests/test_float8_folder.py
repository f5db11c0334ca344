"""Float8 transformers: on disk, on the way to the device, in the commands."""

import json
import math
import shutil
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import convert.written_network
from convert.weights import convert as convert_folder
from convert.weights import main
from wan22_jax import model_folder, sample
from wan22_jax.demo_checkpoint import TINY_TRANSFORMER
from wan22_jax.errors import BadInput
from wan22_jax.model_folder import load_transformer

TARGETS = [
    *(f"blocks.{branch}.{name}" for branch in ("self_attn", "cross_attn") for name in "qkvo"),
    "blocks.ffn.0",
    "blocks.ffn.2",
]


@pytest.fixture(scope="module")
def models(official, tmp_path_factory):
    """The float32 checkpoint as a model folder of each dtype, with their cards."""
    folder = tmp_path_factory.mktemp("models")
    dtypes = ("float8", "bfloat16", "float32")
    cards = {dtype: convert_folder(official, folder / dtype, dtype=dtype) for dtype in dtypes}
    return {dtype: folder / dtype for dtype in dtypes}, cards


@pytest.fixture
def float8(models, tmp_path):
    """A copy of the float8 folder to break."""
    return shutil.copytree(models[0]["float8"], tmp_path / "model")


def read_arrays(module):
    return {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


def quantise(weight):
    """The definition, in NumPy: one matrix, any float dtype."""
    weight = weight.astype(np.float64)
    scale = 2.0 ** math.ceil(math.log2(np.abs(weight).max() / 448))
    return (weight / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn), np.float32(scale)


# Arrays


def test_a_float8_folder_holds_the_checkpoint_quantised(official, models):
    weights = {}
    for shard in official.glob("diffusion_pytorch_model*.safetensors"):
        weights |= load_file(shard)
    found = read_arrays(load_transformer(models[0]["float8"]))
    plain = read_arrays(load_transformer(models[0]["bfloat16"]))
    for target in TARGETS:
        values, scales = found.pop(f"{target}.weight"), found.pop(f"{target}.weight_scale")
        assert (values.dtype, scales.dtype) == (jnp.float8_e4m3fn, jnp.float32)
        for layer in range(TINY_TRANSFORMER.num_layers):
            name = target.replace("blocks.", f"blocks.{layer}.") + ".weight"
            value, scale = quantise(weights[name])
            assert np.asarray(values[layer]).tobytes() == value.tobytes()
            assert scales[layer] == scale
            kept = value.astype(np.float32) * scale
            assert np.abs(kept - weights[name]).max() <= 2**-4 * np.abs(weights[name]).max()
        del plain[f"{target}.weight"]
    assert_same_arrays(found, plain)  # all else is a bfloat16 model


def test_the_linears_take_half_the_disk(models):
    def count(dtype):
        files = [models[0][dtype] / "transformer" / f"{target}.weight" for target in TARGETS]
        return sum(part.stat().st_size for file in files for part in file.glob("[0-9]*"))

    assert 0 < 2 * count("float8") == count("bfloat16")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("amax", [448, 3.0, 7.0, 7.01, 0.02])
def test_rounding_is_numpys_on_any_device(amax, dtype):
    """The converter runs on a CPU and training on a GPU; ties and their neighbours are here."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(limit)) for limit in (0, 999)]
    numbers = np.concatenate([codes, ties, *beside, -ties]) * np.float32(amax / 448)
    weight_OI = np.stack([numbers, numbers[::-1] / 3]).astype(dtype)
    value, scale = quantise(weight_OI)
    values, scales = model_folder.quantise_layer(weight_OI)
    assert np.asarray(values).tobytes() == value.tobytes()
    assert scales == scale


@pytest.mark.parametrize("host", [False, True])
def test_quantised_while_loading_is_what_the_converter_writes(host, models):
    expected = read_arrays(load_transformer(models[0]["float8"]))
    loaded = load_transformer(models[0]["float32"], dtype="float8", host=host)
    assert_same_arrays(read_arrays(loaded), expected)


def test_a_bfloat16_folder_is_quantised_from_its_own_numbers(models, official, tmp_path):
    found = read_arrays(load_transformer(models[0]["bfloat16"], dtype="float8"))
    rounded = shutil.copytree(official, tmp_path / "official")

    def rounds(name: str) -> bool:
        return name.endswith(".weight") and "time_" not in name

    for shard in rounded.glob("diffusion_pytorch_model*.safetensors"):
        tensors = load_file(shard)
        save_file(
            {
                name: tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
                if rounds(name) and not name.startswith("head")
                else tensor
                for name, tensor in tensors.items()
            },
            shard,
        )
    convert_folder(rounded, tmp_path / "out", dtype="float8")
    assert_same_arrays(found, read_arrays(load_transformer(tmp_path / "out")))
    once = read_arrays(load_transformer(models[0]["float8"]))
    assert any(np.any(np.asarray(found[name]) != np.asarray(once[name])) for name in once)


@pytest.mark.parametrize("dtype", ["float8", "bfloat16", "float32"])
def test_host_arrays_are_those_of_the_device_and_leave_it_empty(dtype, models):
    expected = read_arrays(load_transformer(models[0][dtype], dtype=dtype))
    before = jax.live_arrays()  # kept, so that no new array takes an id of theirs
    found = read_arrays(load_transformer(models[0][dtype], host=True))
    assert {type(array) for array in found.values()} == {np.ndarray}
    assert set(map(id, jax.live_arrays())) <= set(map(id, before))
    assert_same_arrays(found, expected)


def test_single_layers_are_wider_than_float8(models, monkeypatch):
    before = jax.live_arrays()  # kept, so that no new array takes an id of theirs
    old = set(map(id, before))
    quantise_layer, seen = model_folder.quantise_layer, []

    def watch(weight):
        seen.append(weight.shape)
        new = [array for array in jax.live_arrays() if id(array) not in old]
        stacked = {array.dtype for array in new if array.shape == (2, *weight.shape)}
        assert stacked <= {jnp.dtype(jnp.float8_e4m3fn)}
        return quantise_layer(weight)

    monkeypatch.setattr(model_folder, "quantise_layer", watch)
    load_transformer(models[0]["bfloat16"], dtype="float8")
    assert len(seen) == len(TARGETS) * TINY_TRANSFORMER.num_layers
    assert all(len(shape) == 2 for shape in seen)


# Cards and digests


def test_only_the_transformer_differs_from_a_bfloat16_model(models):
    cards = models[1]
    assert cards["float8"].dtype == "float8"
    assert model_folder.read_model_card(models[0]["float8"]) == cards["float8"]
    for network in ("vae", "text_encoder"):  # so caches are shared
        assert cards["float8"].digests[network] == cards["bfloat16"].digests[network]
    assert len({card.digests["transformer"] for card in cards.values()}) == 3


def test_the_digest_covers_the_scales(official, models, tmp_path):
    doubled = shutil.copytree(official, tmp_path / "official")
    (shard,) = (
        shard
        for shard in doubled.glob("diffusion_pytorch_model*.safetensors")
        if "blocks.0.ffn.0.weight" in load_file(shard)
    )
    tensors = load_file(shard)
    tensors["blocks.0.ffn.0.weight"] *= 2
    save_file(tensors, shard)
    card = convert_folder(doubled, tmp_path / "out", dtype="float8")
    found = read_arrays(load_transformer(tmp_path / "out"))
    expected = read_arrays(load_transformer(models[0]["float8"]))
    scales = expected.pop("blocks.ffn.0.weight_scale").at[0].multiply(2)
    np.testing.assert_array_equal(found.pop("blocks.ffn.0.weight_scale"), scales)
    assert_same_arrays(found, expected)
    assert card.digests["transformer"] != models[1]["float8"].digests["transformer"]


# Refusals and failures


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.float32])
def test_float8_is_not_widened(dtype, models):
    name = jnp.dtype(dtype).name
    with pytest.raises(BadInput, match=rf"convert again with --dtype {name}"):
        load_transformer(models[0]["float8"], dtype=dtype)


@pytest.mark.parametrize(
    ("stored", "dtype", "transformer_dtype", "chosen"),
    [
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("bfloat16", "bfloat16", "float8", "float8"),
        ("float8", "bfloat16", None, "float8"),
        ("float8", "float32", "float8", "float8"),
        ("float8", "bfloat16", "bfloat16", None),
        ("float8", "bfloat16", "float32", None),
        ("float8", "float32", None, None),
    ],
)
def test_which_dtype_a_run_has(stored, dtype, transformer_dtype, chosen, models):
    folder, card = models[0][stored], models[1][stored]

    def choose():
        return model_folder.choose_transformer_dtype(
            folder, card, dtype=dtype, transformer_dtype=transformer_dtype
        )

    if chosen is not None:
        assert choose() == chosen
        return
    with pytest.raises(BadInput, match=r"its transformer is float8 and was to be loaded as"):
        choose()


def test_a_lost_scale_is_named(float8):
    chunk = float8 / "transformer" / "blocks.ffn.2.weight_scale" / "1"
    chunk.unlink()
    with pytest.raises(BadInput, match=r"blocks\.ffn\.2\.weight_scale/1: this part .* is missing"):
        load_transformer(float8)


def test_a_card_of_another_dtype_is_named(float8):
    card = json.loads((float8 / "model.json").read_text())
    (float8 / "model.json").write_text(json.dumps(card | {"dtype": "bfloat16"}))
    for dtype in (None, "float8"):
        with pytest.raises(BadInput, match=r"arrays differ .*cross_attn\.k\.weight_scale"):
            load_transformer(float8, dtype=dtype)


def test_a_failure_while_quantising_leaves_no_model(official, monkeypatch, tmp_path):
    quantise_layer, calls = convert.written_network.quantise_layer, []

    def fail(weight):
        calls.append(weight)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return quantise_layer(weight)

    monkeypatch.setattr(convert.written_network, "quantise_layer", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(official, tmp_path / "out", dtype="float8")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


# Commands


@pytest.mark.long
def test_convert_and_sample_commands(official, models, capsys, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out.mp4"
    flags = ["--ckpt_path", str(official), "--out", str(model), "--dtype", "float8"]
    assert main(flags) == 0
    assert models[1]["float8"].digest in capsys.readouterr().out
    flags = ["--model", str(model), "--prompt", "a cat", "--out", str(out), "--steps", "1"]
    flags += ["--width", "32", "--height", "32", "--frames", "1", "--guidance", "1"]
    sample.sample(sample.parse_arguments(flags))
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 1
    assert Path(model / "model.json").is_file()
