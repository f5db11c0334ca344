"""The text encoder against Hugging Face transformers (golden/make_umt5.py) and the checkpoint."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import make_umt5
from golden.golden_file import find_faults

from wan22_jax.model.umt5 import UMT5, UMT5_XXL, UMT5Config, relative_buckets

GOLDEN = Path(__file__).parent / "golden"


CONFIG = UMT5Config(**make_umt5.SIZES)


def parameters(encoder) -> dict[str, nnx.Param]:
    state = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
    return {".".join(map(str, path)): leaf for path, leaf in state}


def unstack(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    official = {}
    for name, shape in shapes.items():
        if name.startswith("blocks."):
            rest = name.removeprefix("blocks.")
            official |= {f"blocks.{i}.{rest}": shape[1:] for i in range(shape[0])}
        else:
            official[name] = shape
    return official


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "umt5.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def encoder(golden) -> UMT5:
    encoder = UMT5(CONFIG, rngs=nnx.Rngs(0))
    used = set()
    for name, parameter in parameters(encoder).items():
        if name.startswith("blocks."):
            rest = name.removeprefix("blocks.")
            keys = [f"weight/blocks.{i}.{rest}" for i in range(CONFIG.num_layers)]
            value = np.stack([golden[key] for key in keys])
        else:
            keys, value = [f"weight/{name}"], golden[f"weight/{name}"]
        assert parameter.shape == value.shape, name
        parameter[...] = jnp.asarray(value)
        used.update(keys)
    assert used == {name for name in golden if name.startswith("weight/")}
    return encoder


def cast(encoder: UMT5, dtype) -> UMT5:
    graphdef, state = nnx.split(encoder)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_equals_transformers_at_every_token(encoder, golden):
    text_BSE = encoder(golden["tokens"], golden["mask"])
    assert text_BSE.dtype == jnp.float32
    assert relative_error(np.asarray(text_BSE)[golden["mask"]], golden["text"]) < 1e-5


def test_jit_and_an_integer_mask_change_nothing(encoder, golden):
    @jax.jit
    def run(tokens_BS, mask_BS):
        return encoder(tokens_BS, mask_BS)

    text_BSE = run(golden["tokens"], golden["mask"].astype(np.int32))
    assert relative_error(np.asarray(text_BSE)[golden["mask"]], golden["text"]) < 1e-5


def test_masked_keys_have_no_influence_and_unmasked_ones_have(encoder, golden):
    tokens_BS, mask_BS = golden["tokens"], golden["mask"]
    before = np.asarray(encoder(tokens_BS, mask_BS))
    other_padding = np.asarray(encoder(np.where(mask_BS, tokens_BS, 7), mask_BS))
    np.testing.assert_array_equal(other_padding[mask_BS], before[mask_BS])

    other_token = tokens_BS.copy()
    other_token[1, 44] = tokens_BS[1, 44] % 39 + 1
    after = np.asarray(encoder(other_token, mask_BS))
    assert relative_error(after[1, 0], before[1, 0]) > 1e-3
    np.testing.assert_array_equal(after[0], before[0])


def test_padding_more_changes_nothing(encoder, golden):
    tokens_BS, mask_BS = golden["tokens"][1:2], golden["mask"][1:2]
    wide = np.asarray(encoder(tokens_BS, mask_BS))[mask_BS]
    narrow = np.asarray(encoder(tokens_BS[:, :45], mask_BS[:, :45]))[0]
    assert relative_error(wide, narrow) < 1e-5


def test_a_row_without_tokens_stays_finite(encoder, golden):
    text_BSE = encoder(golden["tokens"], np.zeros_like(golden["mask"]))
    assert np.isfinite(np.asarray(text_BSE)).all()


def test_every_layer_uses_its_own_position_table(encoder, golden):
    tokens_BS, mask_BS = golden["tokens"], golden["mask"]
    before = np.asarray(encoder(tokens_BS, mask_BS))[mask_BS]
    table = "blocks.pos_embedding.embedding.weight"
    for layer in range(CONFIG.num_layers):
        changed = nnx.clone(encoder)
        weight = parameters(changed)[table]
        weight[...] = weight[...].at[layer, 3].add(1.0)  # keys three to the left
        after = np.asarray(changed(tokens_BS, mask_BS))[mask_BS]
        assert relative_error(after, before) > 1e-3, layer


def test_bfloat16_stays_near_float32(encoder, golden):
    tokens_BS, mask_BS = golden["tokens"], golden["mask"]
    text_BSE = cast(encoder, jnp.bfloat16)(tokens_BS, mask_BS)
    assert text_BSE.dtype == jnp.bfloat16
    got = np.asarray(text_BSE.astype(jnp.float32))[mask_BS].astype(np.float64)
    error = np.linalg.norm(got - golden["text"]) / np.linalg.norm(golden["text"])
    assert 1e-4 < error < 0.05


def test_buckets_equal_those_of_transformers(golden):
    length = make_umt5.OFFSET + 1
    bucket_SS = relative_buckets(length)
    assert bucket_SS.shape == (length, length)
    assert bucket_SS.min() == 0
    assert bucket_SS.max() == 31
    # Row 0 has the keys to the right, its mirror image in the last row those to the left.
    np.testing.assert_array_equal(bucket_SS[0], golden["buckets"][make_umt5.OFFSET :])
    np.testing.assert_array_equal(bucket_SS[-1], golden["buckets"][: make_umt5.OFFSET + 1])


def test_full_size_names_and_shapes_are_the_checkpoints():
    encoder = nnx.eval_shape(lambda: UMT5(UMT5_XXL, rngs=nnx.Rngs(0)))
    shapes = unstack({name: leaf.shape for name, leaf in parameters(encoder).items()})
    official = json.loads((GOLDEN / "parameter_names.json").read_text())["t5"]
    assert len(official) == 242
    assert shapes == {name: tuple(shape) for name, shape in official.items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 5_680_910_336  # spec 3.1


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of 3"):
        UMT5(UMT5Config(8, 10, 16, 3, 1), rngs=nnx.Rngs(0))


@pytest.mark.parity
def test_golden_arrays_are_reproduced():
    pytest.importorskip("torch")
    assert find_faults(make_umt5.GOLDEN, make_umt5.make_arrays()) == []
