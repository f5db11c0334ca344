"""Files made for ComfyUI: prefixes, float8 weights with their scales, and what is refused."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, TINY_TRANSFORMER, TINY_VAE, draw_weights
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model.vae import WanVAE
from wan22_jax.quantised import WeightFiles
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import name_tensors, text_encoder_names, transformer_names, vae_names

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SCALE = np.full((), 0.37, np.float32)


@pytest.fixture(scope="module")
def transformer():
    module = nnx.eval_shape(lambda: WanTransformer(TINY_TRANSFORMER, rngs=nnx.Rngs(0)))
    return draw_weights(module, seed=5)


@pytest.fixture(scope="module")
def text_encoder():
    module = nnx.eval_shape(lambda: UMT5(TINY_TEXT_ENCODER, rngs=nnx.Rngs(0)))
    return draw_weights(module, seed=5)


def opened(tensors, path, network="transformer", **metadata):
    save_file(tensors, path / "x.safetensors", metadata=metadata or None)
    return SafetensorsFiles(path / "x.safetensors"), network


def decoded(tensors, path, network="transformer", **metadata):
    return WeightFiles(*opened(tensors, path, network, **metadata))


def pair(weight, scale=SCALE, scale_name="scale_weight"):
    return {"q.weight": weight, f"q.{scale_name}": scale}


def assert_same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


# Decoding


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(16, 16), (256,), (4, 4, 4, 4), (2, 127)])
def test_every_float8_number_is_decoded(dtype, shape, tmp_path):
    """Against one multiplication in float32 of each number, NaN and infinity among them."""
    bits = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    files = decoded(pair(bits.view(dtype)), tmp_path)
    assert files.dtypes == {"q.weight": "F32"}
    expected = np.array([float(x) for x in bits.view(dtype).ravel()], np.float32) * SCALE
    np.testing.assert_array_equal(files.read("q.weight"), expected.reshape(shape))
    rows = slice(1, shape[0])
    np.testing.assert_array_equal(files.read("q.weight", rows), expected.reshape(shape)[rows])


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1), (4, 2, 1), (4, 6, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_is_of_all_of_rows_or_of_their_parts(name, shape, dtype, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 6)).astype(E4M3)
    scale = np.asarray(rng.uniform(0.1, 3, shape)).astype(jnp.dtype(dtype))
    files = decoded(pair(weight, scale, name), tmp_path)
    wide = scale.astype(np.float32)
    wide = wide.reshape(-1, 1) if wide.ndim < 3 else np.repeat(wide[..., 0], 6 // shape[1], axis=1)
    expected = weight.astype(np.float32) * wide
    assert_same(files.read("q.weight"), expected)
    assert_same(files.read("q.weight", slice(1, 3)), expected[1:3])


def test_without_a_scale_the_number_itself_is_meant(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    for dtype in (E4M3, E5M2):
        files = decoded({"q.weight": weight.astype(dtype)}, tmp_path)
        assert_same(files.read("q.weight"), weight)


def test_what_is_no_weight_is_left_out(tmp_path):
    tensors = {
        **pair(np.ones((2, 2), E4M3)),
        "q.bias": np.ones(2, np.float16),
        "q.scale_input": np.ones((), np.float32),
        "q.input_scale": np.ones((), np.float32),
        "q.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
        "scaled_fp8": np.zeros(2, E4M3),
        "spiece_model": np.zeros(9, np.uint8),
        "k.weight": np.ones((2, 2), np.float32),
        "k.scale_weight": np.ones((), np.float32),
    }
    files = decoded(tensors, tmp_path)
    shapes = {"q.weight": (2, 2), "q.bias": (2,), "k.weight": (2, 2)}
    assert files.shapes == shapes
    assert files.dtypes == {"q.weight": "F32", "q.bias": "F16", "k.weight": "F32"}


# Real layouts


def test_the_scaled_text_encoder_of_comfyui(text_encoder, tmp_path):
    """As umt5_xxl_fp8_e4m3fn_scaled.safetensors: linears float8, the rest float16."""
    stored, expected = {"scaled_fp8": np.zeros(0, E4M3)}, {}
    for name, weight in text_encoder.items():
        theirs = text_encoder_names().to_diffusers(name)
        if "relative_attention_bias" in theirs or "norm" in theirs or theirs == "shared.weight":
            stored[theirs] = expected[name] = weight.astype(np.float16)
            continue
        scale = np.full((), np.abs(weight).max() / 448, np.float32)
        stored[theirs] = (weight / scale).astype(E4M3)
        stored[theirs.removesuffix("weight") + "scale_weight"] = scale
        expected[name] = stored[theirs].astype(np.float32) * scale
        assert np.abs(expected[name] - weight).max() < np.abs(weight).max() / 16
    assert sum(name.endswith("scale_weight") for name in stored) == 14
    stored["spiece_model"] = np.zeros(9, np.uint8)
    files, network = opened(stored, tmp_path, "text_encoder")
    tensors = name_tensors(files, network, text_encoder_names())
    assert tensors.unknown == ()
    assert tensors.shapes == {name: weight.shape for name, weight in text_encoder.items()}
    for name, weight in expected.items():
        assert_same(tensors.read(name), weight)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_of_transformers_are_stripped(prefix, transformer, tmp_path):
    stored = {prefix + name: weight.astype(np.float16) for name, weight in transformer.items()}
    if prefix.startswith("model"):  # a whole model in one file
        stored |= {"first_stage_model.conv1.bias": np.zeros(1), "text_encoders.x": np.zeros(1)}
    files, network = opened(stored, tmp_path)
    tensors = name_tensors(files, network, transformer_names())
    assert tensors.unknown == ()
    for name, weight in transformer.items():
        assert_same(tensors.read(name), weight.astype(np.float16))


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "model."])
def test_prefixes_of_vaes_are_stripped(prefix, tmp_path):
    module = nnx.eval_shape(lambda: WanVAE(TINY_VAE, rngs=nnx.Rngs(0)))
    weights = draw_weights(module, seed=5)
    files, network = opened({prefix + n: a for n, a in weights.items()}, tmp_path, "vae")
    tensors = name_tensors(files, network, vae_names(2))
    assert (tensors.unknown, tensors.shapes.keys()) == ((), weights.keys())


def test_a_prefix_does_not_hide_what_is_unknown(transformer, tmp_path):
    stored = {f"diffusion_model.{name}": weight for name, weight in transformer.items()}
    stored["diffusion_model.lost.weight"] = stored["stray.weight"] = np.zeros(1)
    files, network = opened(stored, tmp_path)
    tensors = name_tensors(files, network, transformer_names())
    assert sorted(tensors.unknown) == ["lost.weight", "stray.weight"]
    stored["head.modulation"] = np.zeros(1)
    with pytest.raises(BadInput, match=r"head\.modulation is here with the prefix .* and without"):
        WeightFiles(*opened(stored, tmp_path))


# Refusals

ONE = np.ones((4, 6), E4M3)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (pair(ONE, np.float32([np.nan])), r"q\.scale_weight is not a positive finite number"),
        (pair(ONE, np.float32([np.inf])), r"q\.scale_weight is not a positive finite number"),
        (pair(ONE, np.float32([0])), r"q\.scale_weight is not a positive finite number"),
        (pair(ONE, np.float32([-1])), r"q\.scale_weight is not a positive finite number"),
        (pair(ONE, np.ones(0, "f4")), r"q\.scale_weight is \[0\], which does not scale \[4, 6\]"),
        (pair(ONE, np.ones(6, "f4")), r"q\.scale_weight is \[6\], which does not scale \[4, 6\]"),
        (pair(ONE, np.ones((4, 6), "f4")), r"q.*which does not scale"),
        (pair(ONE, np.ones((4, 0, 1), "f4")), r"q.*which does not scale"),
        (pair(ONE, np.ones((4, 4, 1), "f4")), r"q.*which does not scale"),
        (pair(ONE, np.ones((2, 3), "f4")), r"q.*which does not scale"),
        (pair(ONE, np.ones(4, np.uint8)), r"q\.scale_weight is U8, a scale in float32"),
        (pair(ONE, np.ones(4, E4M3)), r"q\.scale_weight is F8_E4M3, a scale in float32"),
        (pair(ONE) | {"q.weight_scale": SCALE}, r"q\.weight_scale is a second scale of q\.weight"),
        (pair(ONE.astype("f4")), r"q\.scale_weight scales a weight that is not float8"),
        ({"q.scale_weight": SCALE}, r"q\.scale_weight scales q\.weight, which is missing"),
        ({"q.weight": np.ones(3, np.uint8)}, r"q\.weight is U8; weights quantised to anything"),
        ({"q.weight": np.ones(3, np.int8)}, r"q\.weight is I8; weights quantised to anything"),
        ({"q.weight": np.ones((0, 3))}, r"q\.weight is empty, \[0, 3\]"),
        (
            {"0.q.weight": ONE, "1.q.weight": ONE, "1.q.scale_weight": SCALE},
            r"0\.q\.weight has no scale and 1\.q\.weight has one",
        ),
    ],
)
def test_what_cannot_be_decoded_is_named(tensors, why, tmp_path):
    with pytest.raises(BadInput, match=rf"x\.safetensors: {why}"):
        decoded({name: np.asarray(array) for name, array in tensors.items()}, tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format": "nvfp4"}', "is quantised as {'format': 'nvfp4'}, which cannot be read"),
        ('{"format": "float8_e4m3fn", "convrot": true}', "which cannot be read"),
        ("[]", "is quantised as {}, which cannot be read"),
        ("{", "is no JSON text"),
        ("[" * 10**4, "is no JSON text"),
        (" " * 10**5, "is too long for a text"),
    ],
)
def test_formats_are_read_and_refused(text, why, tmp_path):
    tensors = pair(ONE) | {"q.comfy_quant": np.frombuffer(text.encode(), np.uint8)}
    with pytest.raises(BadInput, match=rf"x\.safetensors: q\.comfy_quant .*{why}"):
        decoded(tensors, tmp_path)


def test_formats_of_the_whole_file_count_too(tmp_path):
    layers = {"q": {"format": "float8_e4m3fn"}}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    decoded(pair(ONE, scale_name="weight_scale"), tmp_path, _quantization_metadata=text)
    for wrong in ({"layers": {"q": {"format": "mxfp8"}}}, {"layers": {"q": 5}}, {"layers": 5}, 5):
        with pytest.raises(BadInput, match=r"cannot be read|has no layers"):
            decoded(pair(ONE), tmp_path, _quantization_metadata=json.dumps(wrong))
