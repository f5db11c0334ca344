"""Does what was written make the model compute what the trained one does?

One forward pass at a fixed input, in float32 whatever the weights are stored in, so that the only
difference is the rounding of the file. Blocks are read one at a time, for all variants at once:
the host memory is that of one block of each (0.7 GB of TI2V-5B), and no GPU is needed.

Errors are norms of differences. A LoRA's is relative to what it changes, so that a lost alpha, a
swapped matrix or a wrong name cannot hide behind a base that is much larger; that of a whole model
is relative to its velocity.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan22_jax.adapter import Adapter
from wan22_jax.errors import BadInput
from wan22_jax.model.block_weights import Adapters, Arrays, BlockWeights, join_linears, join_lows
from wan22_jax.model.fused import Activation
from wan22_jax.model.lora import LowRank
from wan22_jax.model.rope import rope_tables
from wan22_jax.model.shards import ONE_DEVICE, Tokens
from wan22_jax.model.transformer import TransformerConfig, WanTransformer, run_block
from wan22_jax.model_folder import abstract_transformer
from wan22_jax.model_tensors import Tensors, read_float32, stacked_weight_shapes
from wan22_jax.weights import set_parameters, stacked_shapes

# Rounding to p bits changes a number by 2^-p at most and by less on the whole: p is 9 of bfloat16,
# 12 of float16 and 4 of float8. A and B are both rounded, and a network weighs errors as it likes:
# 16 times that (4 times of float8, where nothing but the weight is) is still far below what any
# mistake does; an alpha that gets lost where it is twice the rank is 0.5. Arithmetic is float32.
LIMITS = {"float32": 2**-14, "float16": 2**-8, "bfloat16": 2**-5, "float8": 2**-2}
_SEED = 22


class Variant(NamedTuple):
    """A model to compare: weights, and perhaps an adapter on them."""

    weights: Tensors
    adapter: Adapter | None = None


def prove_adapter(
    trained: Adapter,
    written: Adapter,
    *,
    dtype: str,
    base: Tensors | None = None,
    config: TransformerConfig | None = None,
) -> str:
    """Compares a LoRA as it was read from disk with the trained one; says what was found.

    Args:
        trained: float32, as in training.
        written: as read back.
        dtype: that it was written in; decides what error is rounding.
        base: the model that it was trained on. Without one the products x A^T B^T of a fixed x
            are compared, of each target in each layer.
        config: of the base.

    Raises:
        BadInput: they do not compute the same.
    """
    if base is not None and config is not None:
        start, wanted, got = predict(
            config, [Variant(base), Variant(base, trained), Variant(base, written)]
        )
        _check_finite(wanted, trained.source)
        change, how = _norm(wanted - start) / _norm(start), "forward pass"
        error = _norm(got - wanted) / (_norm(wanted - start) or _norm(start))
        effect = f"it changes the velocity by {change:.1e}"
    else:
        wanted, got = _multiply(trained), _multiply(written)
        change, how = _norm(wanted), "products of A and B, without the base model"
        error = _norm(got - wanted) / (change or 1.0)
        effect = "B is not zero"
    if not error <= LIMITS[dtype]:
        raise BadInput(
            f"{written.source}: computes something else than what was trained (relative error "
            f"{error:.1e} of what the LoRA changes, {dtype} explains {LIMITS[dtype]:.1e}); it was "
            "deleted, choose another --dtype or report this"
        )
    if change == 0:
        return f"{how}: the LoRA is zero (untrained), it changes nothing"
    return f"{how}: relative error {error:.1e} of what the LoRA changes, {effect}"


def prove_model(
    trained: Variant,
    merged: Tensors,
    written: Tensors,
    *,
    dtype: str,
    config: TransformerConfig,
    source: str,
) -> str:
    """Compares a whole model as it was read from disk with the trained one; says what was found.

    Args:
        trained: as in training: its weights, or its base with the LoRA beside it.
        merged: what was to be written: the weights of ``trained``, with the LoRA in them.
        written: as read back.
        dtype: that it was written in; decides what error is rounding.
        config: of both.
        source: the file, for messages.

    Raises:
        BadInput: they do not compute the same.
    """
    variants = [trained, Variant(written)]
    if trained.adapter is not None:
        variants += [Variant(merged), Variant(trained.weights)]
    wanted, got, *others = predict(config, variants)
    _check_finite(wanted, source)
    error = _norm(got - wanted) / _norm(wanted)
    checks = [(error, dtype)]
    line = f"forward pass: relative error {error:.1e}"
    if others:  # before the rounding, which can be more than all that a LoRA changes
        exact, start = others
        checks.append((_norm(exact - wanted) / _norm(wanted), "float32"))
        line += f", the LoRA changes the velocity by {_norm(wanted - start) / _norm(wanted):.1e}"
    for found, rounding in checks:
        if not found <= LIMITS[rounding]:
            raise BadInput(
                f"{source}: computes something else than the trained model (relative error "
                f"{found:.1e}, {rounding} explains {LIMITS[rounding]:.1e}); it was deleted, choose "
                "another --dtype or report this"
            )
    return line


def _check_finite(wanted: np.ndarray, source: str) -> None:
    if not np.isfinite(wanted).all():
        raise BadInput(
            f"{source}: what was trained computes infinite or NaN numbers; choose an earlier "
            "checkpoint, or smaller strengths of LoRAs"
        )


def predict(config: TransformerConfig, variants: Sequence[Variant]) -> list[np.ndarray]:
    """Returns the velocity [1, 2, 4, 4, C] of each variant at the fixed input, float32."""
    latents_BTYXC, sigma_BT, text_BSE = draw_inputs(config)
    one_block = replace(config, num_layers=1)
    states, heads = [], []
    for variant in variants:
        model = _load_ends(one_block, variant.weights)
        x_BLD, grid_TYX = model.patch_embedding(jnp.asarray(latents_BTYXC))
        text_BSD = model.embed_text(jnp.asarray(text_BSE))
        time_BTD, time_BTMD = model.embed_time(jnp.asarray(sigma_BT))
        rope = rope_tables(grid_TYX, config.dim // config.num_heads)
        context = (time_BTMD, Activation(text_BSD.reshape(-1, config.dim)), rope)
        states.append((x_BLD, context))
        tokens = Tokens(ONE_DEVICE, num_frames=grid_TYX[0], count=x_BLD.shape[1])
        heads.append(partial(model.head, time_BTD=time_BTD, grid_TYX=grid_TYX, tokens=tokens))
    for layer in range(config.num_layers):
        blocks: dict[int, Arrays] = {}  # by the weights that they are of
        for number, (variant, (x_BLD, context)) in enumerate(zip(variants, states, strict=True)):
            key = id(variant.weights)
            if key not in blocks:
                blocks[key] = _read_block(variant.weights, layer)
            adapters = _read_adapters(variant, layer)
            after_BLD = _run_block(x_BLD, blocks[key], adapters, context, config=config)
            states[number] = (after_BLD, context)
    return [np.asarray(head(x)) for head, (x, _) in zip(heads, states, strict=True)]


def draw_inputs(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the fixed input: latents, noise level and text, as the transformer takes them."""
    rng = np.random.default_rng(_SEED)
    latents_BTYXC = rng.standard_normal((1, 2, 4, 4, config.in_channels), np.float32)
    text_BSE = 0.1 * rng.standard_normal((1, min(8, config.text_len), config.text_dim), np.float32)
    return latents_BTYXC, np.array([[0.3, 0.7]], np.float32), text_BSE


def _load_ends(one_block: TransformerConfig, weights: Tensors) -> WanTransformer:
    """What comes before and after the blocks; the one block of this model is not used."""
    model = abstract_transformer(one_block, float8=False)
    arrays = {
        name: np.broadcast_to(np.float32(0), shape)  # takes no memory
        if name.startswith("blocks.")
        else jnp.asarray(read_float32(weights, name))
        for name, shape in stacked_shapes(model).items()
    }
    set_parameters(model, arrays)
    return model


def _read_block(weights: Tensors, layer: int) -> Arrays:
    prefix = f"blocks.{layer}."
    return {
        name.removeprefix(prefix): jnp.asarray(read_float32(weights, name))
        for name in weights.shapes
        if name.startswith(prefix)
    }


def _read_adapters(variant: Variant, layer: int) -> Adapters:
    adapter = variant.adapter
    lows: dict[str, LowRank | None] = {}
    for target in sorted(stacked_weight_shapes(variant.weights)):
        lows[target] = None
        if adapter is not None and target in adapter.alphas:
            matrix_a, matrix_b = (
                jnp.asarray(adapter.matrices[f"blocks.{target}.{side}"][layer], jnp.float32)
                for side in ("lora_A", "lora_B")
            )
            lows[target] = LowRank(adapter.scale(target) * matrix_a, (matrix_b,))
    return join_lows(lows, dtype=jnp.float32)


@partial(jax.jit, static_argnames="config")
def _run_block(
    x_BLD: jax.Array,
    arrays: Arrays,
    adapters: Adapters,
    context: tuple,
    *,
    config: TransformerConfig,
) -> jax.Array:
    weights = BlockWeights(join_linears(arrays), adapters)
    frames = context[0].shape[1]
    tokens = Tokens(ONE_DEVICE, num_frames=frames, count=x_BLD.shape[1])
    return run_block(x_BLD, weights, *context, config=config, tokens=tokens)


def _multiply(adapter: Adapter) -> np.ndarray:
    """Returns alpha / rank * B A x of a fixed x, of all targets and layers, in one vector."""
    parts = []
    for target in sorted(adapter.alphas):
        matrix_a, matrix_b = (
            adapter.matrices[f"blocks.{target}.{side}"].astype(np.float64)
            for side in ("lora_A", "lora_B")
        )
        x_I = np.random.default_rng(_SEED).standard_normal(matrix_a.shape[-1])
        low_NR = matrix_a @ x_I
        parts.append(adapter.scale(target) * np.einsum("nor,nr->no", matrix_b, low_NR).ravel())
    return np.concatenate(parts)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64).ravel()))
