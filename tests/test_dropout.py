"""LoRA dropout: the mask is a function of example, layer and target, in every pass over them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan22_jax.model.fp8 import quantize_weight
from wan22_jax.model.fused import activate
from wan22_jax.model.linear import LinearWeights, linear, linear_gelu_linear
from wan22_jax.model.lora import Dropout, LowRank
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.draws import Draws, draw_dropout
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.step import StepSettings, loss_fn, split_model

B, L, NUM_IN, NUM_OUT, RANK, RATE = 2, 3, 8, 6, 2, 0.4


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def make_dropout(rate: float = RATE, positions=(0, 1)) -> Dropout:
    dropout = draw_dropout(jax.random.key(5), jnp.asarray(positions), rate=rate)
    assert dropout is not None
    return dropout


def test_elements_are_dropped_or_scaled_up():
    rows = jnp.ones((2 * 300, 40), jnp.bfloat16)
    dropped = np.asarray(make_dropout().drop(rows), np.float32)
    kept = float(jnp.bfloat16(1 / (1 - RATE)))
    assert set(np.unique(dropped)) == {0.0, kept}
    assert abs(np.mean(dropped == 0) - RATE) < 0.02
    assert draw_dropout(jax.random.key(5), jnp.arange(2), rate=0.0) is None


def test_masks_depend_on_step_position_layer_and_target():
    rows = jnp.ones((2 * L, NUM_IN))
    mask = make_dropout().drop(rows)
    np.testing.assert_array_equal(mask, make_dropout().drop(rows))
    assert np.any(mask[:L] != mask[L:])
    # An example has its mask wherever it stands: micro-batches drop what one batch would.
    swapped = make_dropout(positions=(1, 0)).drop(rows)
    np.testing.assert_array_equal(mask[:L], swapped[L:])
    later = draw_dropout(jax.random.key(6), jnp.arange(2), rate=RATE)
    others = [later.drop(rows)]
    others += [make_dropout().at(layer).at(target).drop(rows) for layer, target in ((1, 0), (0, 1))]
    assert len({np.asarray(other).tobytes() for other in [mask, *others]}) == 4


def make_weights(seed: int, num_in: int, num_out: int, *, groups: int = 1, float8: bool = False):
    weight, scale = normal(seed, groups * num_out, num_in), None
    if float8:
        weight, scale = quantize_weight(weight)
        scale = jnp.broadcast_to(scale, (groups,))
    lora = LowRank(
        normal(seed + 1, groups * RANK, num_in),
        tuple(normal(seed + 2 + group, num_out, RANK) for group in range(groups)),
    )
    return LinearWeights(weight, scale, None, lora, lora)


def test_joined_linears_drop_apart_and_the_weight_sees_all():
    weights = make_weights(1, NUM_IN, NUM_OUT, groups=3)
    x, dropout = normal(9, B * L, NUM_IN), make_dropout()
    probe = [normal(20 + group, B * L, NUM_OUT) for group in range(3)]

    def ours(x, lora):
        outs = linear(
            activate(x, is_float8=False),
            weights._replace(lora=jax.lax.stop_gradient(lora), trained=lora, dropout=dropout),
            groups=3,
        )
        return sum(jnp.vdot(p, out) for p, out in zip(probe, outs, strict=True)), outs

    def plain(x, lora):
        outs = []
        for group in range(3):
            rows, a = dropout.at(group).drop(x), lora.matrix_a[group * RANK : (group + 1) * RANK]
            weight = weights.weight_OI[group * NUM_OUT : (group + 1) * NUM_OUT]
            outs.append(x @ weight.T + rows @ a.T @ lora.matrices_b[group].T)
        return sum(jnp.vdot(p, out) for p, out in zip(probe, outs, strict=True)), tuple(outs)

    args = (x, weights.lora)
    both = [jax.grad(f, argnums=(0, 1), has_aux=True)(*args) for f in (ours, plain)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        assert np.any(np.asarray(a))


@pytest.mark.parametrize("float8", [False, True])
def test_the_feed_forward_with_next_to_no_dropout_is_the_one_without(float8):
    first = make_weights(1, NUM_IN, 16, float8=float8)
    second = make_weights(7, 16, NUM_OUT, float8=float8)
    dtype = jnp.bfloat16 if float8 else jnp.float32  # float8 products come as bfloat16
    probe = normal(30, B * L, NUM_OUT)

    def loss(x, loras, dropout):
        weights = [
            each._replace(lora=jax.tree.map(lambda m: m.astype(dtype), lora), trained=lora)
            for each, lora in zip((first, second), loras, strict=True)
        ]
        out = linear_gelu_linear(
            activate(x, is_float8=float8),
            weights[0]._replace(dropout=dropout),
            weights[1]._replace(dropout=None if dropout is None else dropout.at(1)),
            name="ffn_in",
        )
        return jnp.vdot(probe, out)

    x, loras = normal(9, B * L, NUM_IN).astype(dtype), (first.lora, second.lora)
    run = jax.value_and_grad(loss, argnums=(0, 1))
    plain, almost, much = (
        jax.tree.leaves(run(x, loras, dropout))
        for dropout in (None, make_dropout(1e-9), make_dropout(0.5))
    )
    # The adapters' product is rounded to bfloat16 before it is added, and e5m2 has two bits.
    tolerance = 0.05 if float8 else 1e-5
    for leaves in zip(plain, almost, much, strict=True):
        a, b, c = (np.asarray(leaf, np.float32) for leaf in leaves)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(a)
        assert np.linalg.norm(a - c) > 0.2 * np.linalg.norm(a)


CONFIG = TransformerConfig(
    dim=8, ffn_dim=12, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8,
    text_len=4, freq_dim=8,
)  # fmt: skip


@pytest.mark.long
def test_blocks_that_are_computed_again_drop_the_same():
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.add_lora(jax.random.key(1), rank=2, alpha=6.0)
    graphdef, trainable, frozen = split_model(model)
    trainable = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape) * 0.3, trainable)
    draws = Draws(normal(2, B, 2, 2, 2, 4), jnp.full((B, 2), 0.5), jnp.ones((B, 2)))
    args = (normal(3, B, 2, 2, 2, 4), normal(4, B, 4, 8), draws, None)

    def run(policy, blocks_to_swap, dropout):
        placed = place_frozen(
            frozen,
            activation_checkpointing=policy,
            blocks_to_swap=blocks_to_swap,
            sharding=replicated(make_mesh()),
        )
        settings = StepSettings(activation_checkpointing=policy)
        loss = partial(loss_fn, graphdef=graphdef, settings=settings)
        return jax.jit(jax.grad(loss, has_aux=True))(trainable, placed, *args, dropout)

    kept = run(False, 0, make_dropout())
    for policy, blocks_to_swap in ((True, 0), ("unsloth", 2)):
        again = run(policy, blocks_to_swap, make_dropout())
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
            scale = np.abs(np.asarray(a)).max()
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
    without = run(False, 0, None)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(without), strict=True):
        assert np.abs(np.asarray(a - b)).max() > 0.01 * np.abs(np.asarray(a)).max()
