"""Names in both directions, and checkpoints into modules: exact bits, or an error that says all."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, TINY_TRANSFORMER, TINY_VAE, draw_weights
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TI2V_5B, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5_XXL
from wan22_jax.model.vae import WAN22_VAE, WanVAE
from wan22_jax.weights import (
    keeps_float32,
    load_transformer,
    load_umt5,
    load_vae,
    official_names,
    parameter_shapes,
    set_parameters,
    stacked_shapes,
    text_encoder_names,
    transformer_names,
    vae_names,
)

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = json.loads((GOLDEN / "parameter_names.json").read_text())
DIFFUSERS = json.loads((GOLDEN / "diffusers_names.json").read_text())
TABLES = {"transformer": transformer_names(), "vae": vae_names(2), "t5": text_encoder_names()}
NETWORKS = {
    "transformer": (WanTransformer, TINY_TRANSFORMER, load_transformer),
    "vae": (WanVAE, TINY_VAE, load_vae),
    "t5": (UMT5, TINY_TEXT_ENCODER, load_umt5),
}
FULL_SIZE = {"transformer": TI2V_5B, "vae": WAN22_VAE, "t5": UMT5_XXL}
every_network = pytest.mark.parametrize("network", NETWORKS)


def abstract(network, config=None):
    kind, tiny, _ = NETWORKS[network]
    return nnx.eval_shape(lambda: kind(config or tiny, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tiny_weights():
    return {network: draw_weights(abstract(network), seed=3) for network in NETWORKS}


def read_official(module):
    """Reads every parameter of a module back under its official name."""
    flat = {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    return {
        official: array[layer] if stacked.startswith("blocks.") else array
        for stacked, array in flat.items()
        for layer, official in enumerate(official_names(stacked, array.shape))
    }


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


# Names


@every_network
def test_names_translate_both_ways(network):
    table, names = TABLES[network], DIFFUSERS[network]
    assert {name: table.to_diffusers(name) for name in names} == names
    assert {table.to_official(name): name for name in names.values()} == names


@every_network
def test_a_name_matches_one_pattern(network):
    table = TABLES[network]
    for official, diffusers in DIFFUSERS[network].items():
        assert sum(bool(pattern.fullmatch(official)) for pattern, _ in table._by_official) == 1
        assert sum(bool(pattern.fullmatch(diffusers)) for pattern, _ in table._by_diffusers) == 1


@pytest.mark.parametrize(
    "name", ["blocks.00.norm3.bias", "blocks.0.norm1.bias", "model.head.head.bias", "head.head"]
)
def test_names_are_strict(name):
    with pytest.raises(KeyError):
        transformer_names().to_diffusers(name)


def test_vae_resampling_index_follows_the_residual_blocks():
    name = "encoder.down_blocks.0.downsampler.resample.1.bias"
    assert vae_names(1).to_official(name) == "encoder.downsamples.0.downsamples.1.resample.1.bias"
    name = "decoder.up_blocks.0.upsampler.time_conv.bias"
    assert vae_names(1).to_official(name) == "decoder.upsamples.0.upsamples.2.time_conv.bias"


@every_network
def test_full_size_parameters_are_the_official_ones(network):
    shapes = parameter_shapes(abstract(network, FULL_SIZE[network]))
    assert {name: list(shape) for name, shape in shapes.items()} == OFFICIAL[network]


def test_what_stays_float32():
    kept = {name for name in OFFICIAL["transformer"] if keeps_float32(name)}
    assert kept == {
        *(f"blocks.{layer}.modulation" for layer in range(30)),
        *(f"time_embedding.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        "time_projection.1.weight",
        "time_projection.1.bias",
        "head.modulation",
        "head.head.weight",
        "head.head.bias",
    }
    assert keeps_float32("blocks.modulation")  # the stacked name
    assert not any(map(keeps_float32, [*OFFICIAL["vae"], *OFFICIAL["t5"]]))


# Loading


@every_network
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_load_keeps_every_bit(network, layout, tiny_weights, tmp_path):
    weights = stored = tiny_weights[network]
    if layout == "diffusers":
        stored = {TABLES[network].to_diffusers(name): array for name, array in weights.items()}
    save_file(stored, tmp_path / "weights.safetensors")
    _, config, load = NETWORKS[network]
    module = load(tmp_path / "weights.safetensors", config, dtype=jnp.float32)
    assert_same_bits(read_official(module), weights)


@pytest.mark.parametrize("with_index", [False, True])
def test_shards_load_as_one(with_index, tiny_weights, tmp_path):
    write_shards(tmp_path, tiny_weights["t5"], with_index=with_index)
    assert_same_bits(read_official(load_umt5(tmp_path, TINY_TEXT_ENCODER)), tiny_weights["t5"])


def write_shards(folder, weights, *, with_index):
    names = sorted(weights)
    shards = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    if with_index:
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "x.safetensors.index.json").write_text(json.dumps(index))
        save_file({"stray": np.zeros(1)}, folder / "not_in_the_index.safetensors")


@every_network
def test_bfloat16_rounds_all_but_what_stays(network, tiny_weights, tmp_path):
    save_file(tiny_weights[network], tmp_path / "w.safetensors")
    _, config, load = NETWORKS[network]
    expected = {
        name: array if keeps_float32(name) else array.astype(ml_dtypes.bfloat16)
        for name, array in tiny_weights[network].items()
    }
    module = load(tmp_path / "w.safetensors", config, dtype=jnp.bfloat16)
    assert_same_bits(read_official(module), expected)


def test_float16_files_load(tiny_weights, tmp_path):
    half = {name: array.astype(np.float16) for name, array in tiny_weights["t5"].items()}
    save_file(half, tmp_path / "w.safetensors")
    module = load_umt5(tmp_path / "w.safetensors", TINY_TEXT_ENCODER, dtype=jnp.float32)
    expected = {name: array.astype(np.float32) for name, array in half.items()}
    assert_same_bits(read_official(module), expected)


def test_set_parameters_needs_every_name():
    module = abstract("t5")
    arrays = {name: jnp.zeros(shape) for name, shape in stacked_shapes(module).items()}
    del arrays["norm.weight"]
    with pytest.raises(KeyError, match=r"norm\.weight"):
        set_parameters(module, arrays)


# Bad files


def test_one_error_lists_every_fault(tiny_weights, tmp_path):
    weights = dict(tiny_weights["transformer"])
    for layer in range(2):
        del weights[f"blocks.{layer}.norm3.bias"]
    del weights["head.modulation"]
    weights["img_emb.proj.weight"] = np.zeros((2, 2))
    weights["blocks.2.norm3.bias"] = np.zeros((48,))  # a layer too many
    weights["head.head.bias"] = np.zeros((7,))
    file = tmp_path / "w.safetensors"
    save_file(weights, file)
    with pytest.raises(BadInput) as error:
        load_transformer(file, TINY_TRANSFORMER)
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert "3 missing: " in message
    assert "blocks.{0-1}.norm3.bias" in message
    assert "head.modulation" in message
    assert "2 unknown: img_emb.proj.weight, blocks.2.norm3.bias" in message
    assert "1 of another shape: head.head.bias expected [192] found [7]" in message
    assert "14B" not in message


@pytest.mark.parametrize("shape", [(48, 36, 1, 2, 2), (48, 16, 1, 2, 2), (5120, 48, 1, 2, 2)])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_other_transformers_are_named(shape, layout, tiny_weights, tmp_path):
    weights = {**tiny_weights["transformer"], "patch_embedding.weight": np.zeros(shape)}
    if layout == "diffusers":
        weights = {transformer_names().to_diffusers(name): a for name, a in weights.items()}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"Wan2\.1 or Wan2\.2 14B; wan22_jax trains TI2V-5B only"):
        load_transformer(tmp_path / "w.safetensors", TINY_TRANSFORMER)


def test_the_wan21_vae_is_named(tiny_weights, tmp_path):
    save_file({**tiny_weights["vae"], "conv2.weight": np.zeros((16, 16, 1, 1, 1))}, tmp_path / "w")
    with pytest.raises(BadInput, match=r"this is the Wan2\.1 VAE"):
        load_vae(tmp_path / "w", TINY_VAE)


def test_only_an_equal_tied_embedding_may_be_extra(tiny_weights, tmp_path):
    weights = {text_encoder_names().to_diffusers(n): a for n, a in tiny_weights["t5"].items()}
    file, tied = tmp_path / "w.safetensors", "encoder.embed_tokens.weight"
    save_file({**weights, tied: weights["shared.weight"]}, file)
    module = load_umt5(file, TINY_TEXT_ENCODER)
    assert_same_bits(read_official(module), tiny_weights["t5"])
    save_file({**weights, tied: weights["shared.weight"] + 1}, file)
    with pytest.raises(BadInput, match=r"embed_tokens\.weight differs from shared\.weight"):
        load_umt5(file, TINY_TEXT_ENCODER)
    save_file({**tiny_weights["t5"], "embed_tokens.weight": np.zeros(1)}, file)
    with pytest.raises(BadInput, match=r"1 unknown: embed_tokens\.weight"):
        load_umt5(file, TINY_TEXT_ENCODER)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("loaded_as", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_is_named(wrong, dtype, loaded_as, tiny_weights, tmp_path):
    weights = {name: array.astype(dtype) for name, array in tiny_weights["t5"].items()}
    weights["blocks.1.ffn.fc1.weight"][3, 2] = wrong
    save_file(weights, tmp_path / "w.safetensors")
    match = r"w\.safetensors: blocks\.1\.ffn\.fc1\.weight has infinite or NaN values"
    with pytest.raises(BadInput, match=match):
        load_umt5(tmp_path / "w.safetensors", TINY_TEXT_ENCODER, dtype=loaded_as)


def test_numbers_that_overflow_are_named(tiny_weights, tmp_path):
    weights = {name: array.astype(np.float64) for name, array in tiny_weights["t5"].items()}
    file = tmp_path / "w.safetensors"
    weights["norm.weight"][0] = -3.4e38  # bfloat16 ends at 3.39e38
    save_file(weights, file)
    load_umt5(file, TINY_TEXT_ENCODER, dtype=jnp.float32)
    with pytest.raises(BadInput, match=r"norm\.weight has values beyond bfloat16"):
        load_umt5(file, TINY_TEXT_ENCODER, dtype=jnp.bfloat16)
    weights["norm.weight"][0] = 1e39
    save_file(weights, file)
    with pytest.raises(BadInput, match=r"norm\.weight has values beyond float32"):
        load_umt5(file, TINY_TEXT_ENCODER, dtype=jnp.float32)


def test_the_largest_bfloat16_numbers_are_finite(tiny_weights, tmp_path):
    weights = {n: array.astype(ml_dtypes.bfloat16) for n, array in tiny_weights["t5"].items()}
    extremes = np.array([0x7F7F, 0xFF7F, 0x8000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
    weights["norm.weight"][:4] = extremes
    save_file(weights, tmp_path / "w.safetensors")
    module = load_umt5(tmp_path / "w.safetensors", TINY_TEXT_ENCODER, dtype=jnp.bfloat16)
    assert_same_bits(read_official(module), weights)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(keep, tiny_weights, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(tiny_weights["t5"], file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"w\.safetensors: a complete safetensors file was expected"):
        load_umt5(file, TINY_TEXT_ENCODER)


def test_folder_faults_are_named(tiny_weights, tmp_path):
    with pytest.raises(BadInput, match="nowhere: a complete safetensors file was expected"):
        load_umt5(tmp_path / "nowhere", TINY_TEXT_ENCODER)
    with pytest.raises(BadInput, match=r"no \*\.safetensors here"):
        load_umt5(tmp_path, TINY_TEXT_ENCODER)
    write_shards(tmp_path, tiny_weights["t5"], with_index=True)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.incomplete")
    with pytest.raises(BadInput, match=r"missing a\.safetensors of its index"):
        load_umt5(tmp_path, TINY_TEXT_ENCODER)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text('{"weight_map":')
    with pytest.raises(BadInput, match=r"x\.safetensors\.index\.json: an index .* was expected"):
        load_umt5(tmp_path, TINY_TEXT_ENCODER)
    (tmp_path / "y.safetensors.index.json").write_text("{}")
    with pytest.raises(BadInput, match="one checkpoint was expected"):
        load_umt5(tmp_path, TINY_TEXT_ENCODER)


def test_a_name_in_two_files_is_refused(tiny_weights, tmp_path):
    save_file(tiny_weights["t5"], tmp_path / "a.safetensors")
    save_file(tiny_weights["t5"], tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match=r"b\.safetensors: .* is also in a\.safetensors"):
        load_umt5(tmp_path, TINY_TEXT_ENCODER)
