"""Training all weights: which they are, what their gradients are, and where they lie."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.make_transformer import GOLDEN, SIZES, draw_inputs, draw_target, draw_weights, thin

from wan22_jax.batch import Batch
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.remat import POLICIES
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig, WanTransformer
from wan22_jax.model_folder import abstract_transformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.full import (
    count_parameters,
    describe_full,
    group_weights,
    merge_full,
    place_full,
    split_full,
)
from wan22_jax.training.rounding import round_stochastically, round_to_bfloat16
from wan22_jax.training.step import Frozen, StepSettings, TrainState, compile_train_step
from wan22_jax.weights import parameter_shapes, set_parameters, stacked_shapes, stored_dtype

GOLDEN_CONFIG = TransformerConfig(**SIZES)
SHARDING = replicated(make_mesh())
FULL_POLICIES = [name for name, policy in POLICIES.items() if not policy.on_host]


# Which weights, and their gradients


def test_all_parameters_of_the_5b_train():
    templates = []

    def split() -> dict:
        _, weights, template = split_full(
            WanTransformer(TI2V_5B, rngs=nnx.Rngs(0)), dtype="bfloat16"
        )
        templates.append(template)
        return weights

    weights = jax.eval_shape(split)
    model = abstract_transformer(TI2V_5B, float8=False)
    assert count_parameters(weights) == 4_999_787_712
    assert {name: array.shape for name, array in weights.items()} == parameter_shapes(model)
    assert not sum(leaf.size for leaf in jax.tree.leaves(templates))
    assert describe_full(model, dtype="float32") == {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()
    }
    groups = group_weights(weights)
    assert list(groups) == [*map(str, range(30)), "rest"]
    assert all(len(groups[str(index)]) == 27 for index in range(30))
    assert sum(map(len, groups.values())) == len(weights) == 825


@pytest.fixture(scope="module")
def golden_parts() -> tuple:
    model = nnx.eval_shape(lambda: WanTransformer(GOLDEN_CONFIG, rngs=nnx.Rngs(0)))
    drawn = draw_weights(parameter_shapes(model))
    arrays = {}
    for name, shape in stacked_shapes(model).items():
        rest = name.removeprefix("blocks.")
        arrays[name] = (
            np.stack([drawn[f"blocks.{layer}.{rest}"] for layer in range(shape[0])])
            if name.startswith("blocks.")
            else drawn[name]
        )
    set_parameters(model, arrays)
    return split_full(model, dtype="float32")


def differentiate_golden(parts: tuple, policy: bool | str) -> tuple[Any, dict[str, jax.Array]]:
    graphdef, weights, template = parts

    def compute_loss(weights: dict) -> jax.Array:
        model, rows = merge_full(graphdef, weights, template)
        velocity = model(*draw_inputs("mixed"), activation_checkpointing=policy, parts=(rows,))
        return jnp.mean((velocity - draw_target()) ** 2)

    grad = jax.grad(compute_loss)
    weights = {name: jnp.asarray(array) for name, array in weights.items()}
    return jax.make_jaxpr(grad)(weights), jax.jit(grad)(weights)


def test_gradients_of_all_weights_match_diffusers(golden_parts):
    golden = dict(np.load(GOLDEN))
    _, grads = differentiate_golden(golden_parts, True)
    names = {name.removeprefix("gradient/") for name in golden if name.startswith("gradient/")}
    assert names - {"latents", "text"} == grads.keys()
    for name, grad in grads.items():
        want = golden[f"gradient/{name}"]
        assert np.abs(thin(np.asarray(grad)) - want).max() < 1e-5 * np.abs(want).max(), name
        assert np.any(grad), name


@pytest.mark.parametrize("policy", [name for name in FULL_POLICIES if name not in (True, False)])
def test_no_policy_changes_the_gradients(golden_parts, policy):
    _, want = differentiate_golden(golden_parts, True)
    program, got = differentiate_golden(golden_parts, policy)
    assert "remat" in str(program)
    for name, grad in got.items():
        np.testing.assert_allclose(grad, want[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert grad.shape == golden_parts[1][name].shape


# Steps


def make_weights() -> dict[str, jax.Array]:
    shapes = {f"blocks.{i}.ffn.0.{leaf}": shape for i in range(3) for leaf, shape in _LEAVES}
    shapes["text_embedding.0.weight"] = (6, 5)
    shapes["blocks.1.modulation"] = (1, 6, 4)
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), "f4") for name, shape in shapes.items()}


_LEAVES = (("weight", (8, 4)), ("bias", (8,)))


def make_optimizer(rounding: str | None, *, on_host: bool = False) -> BlockwiseOptimizer:
    inner = optax.adamw(1e-2)
    if rounding is not None:
        inner = round_to_bfloat16(inner, rounding=rounding, seed=0)
    return BlockwiseOptimizer(inner, max_grad_norm=0.5, on_host=on_host)


def narrow(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: leaf.astype(stored_dtype(name, "bfloat16")) for name, leaf in weights.items()}


def take_steps(optimizer: BlockwiseOptimizer, weights: dict, count: int = 3) -> tuple[Any, Any]:
    weights = jax.device_put(weights, SHARDING)
    state = optimizer.place_state(weights)
    places = jax.tree.map(lambda leaf: leaf.sharding, (weights, state))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, optimizer.describe_state(weights)
    )
    step = jax.jit(optimizer.step, out_shardings=places)
    for index in range(count):
        grads = jax.tree.map(lambda leaf: jnp.cos(leaf + index), weights)  # noqa: B023
        weights, state = step(grads, state, weights, optax.global_norm(grads))
    return weights, state


@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
def test_state_on_the_host_changes_no_bit(rounding):
    weights = make_weights() if rounding is None else narrow(make_weights())
    near = take_steps(make_optimizer(rounding), weights)
    far = take_steps(make_optimizer(rounding, on_host=True), weights)
    kinds = {(leaf.ndim > 0, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(far[1])}
    assert kinds == {(False, "device"), (True, "pinned_host")}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((near, far[0]))} == {"device"}
    for a, b in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for name, leaf in far[0].items():
        assert leaf.dtype == weights[name].dtype
        assert np.any(np.asarray(leaf) != np.asarray(weights[name])), name


def test_blocks_are_updated_as_all_weights_together_and_clipped_by_their_common_norm():
    weights, optimizer = (
        make_weights(),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    )
    want, state = weights, optimizer.init(weights)
    for index in range(3):
        grads = jax.tree.map(lambda leaf: jnp.cos(leaf + index), want)  # noqa: B023
        assert optax.global_norm(grads) > 2
        updates, state = optimizer.update(grads, state, want)
        want = optax.apply_updates(want, updates)
    got, _ = take_steps(make_optimizer(None), weights)
    free, _ = take_steps(make_optimizer(None)._replace(max_grad_norm=0.0), weights)
    for name, leaf in got.items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-5, err_msg=name)
    assert any(np.any(np.asarray(free[name]) != np.asarray(leaf)) for name, leaf in got.items())


def test_a_step_trains_every_weight_and_compiles_once():
    config = TransformerConfig(
        dim=16, ffn_dim=24, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=8
    )
    model = WanTransformer(config, rngs=nnx.Rngs(0))
    graphdef, drawn, template = split_full(model, dtype="bfloat16")
    weights = place_full(drawn, SHARDING, dtype="float32")
    optimizer = make_optimizer(None, on_host=True)
    number = jax.device_put(jnp.zeros((), jnp.int32), SHARDING)
    state = TrainState(number, weights, optimizer.place_state(weights))
    frozen = Frozen(jax.device_put(template, SHARDING))
    settings = StepSettings(activation_checkpointing=True)
    step = compile_train_step(graphdef, optimizer, settings, state=state, frozen=frozen)
    rng = np.random.default_rng(0)
    batch = Batch(
        rng.normal(size=(1, 1, 2, 4, 4, 48)).astype(jnp.bfloat16),
        rng.normal(size=(1, 1, 4, 8)).astype(jnp.bfloat16),
    )
    batch_and_draws = (batch, jax.random.key(0), jnp.asarray(sigma_grid()))
    rest = (frozen, *jax.device_put(batch_and_draws, SHARDING))
    compiled = step.lower(state, *rest).compile()
    for _ in range(2):  # the second step's arrays lie where the first's do, or this would raise
        state, metrics = compiled(state, *rest)
    assert np.isfinite(metrics["grad_norm"])
    for name, leaf in state.trainable.items():
        assert leaf.dtype == jnp.float32
        assert np.any(np.asarray(leaf) != np.asarray(drawn[name])), name


# Rounding


def words(seed: int) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed))


def test_stochastic_rounding_is_right_on_average_and_repeats_itself():
    x = jnp.full((200, 100), 1 + 0.3 / 128, jnp.float32)  # bfloat16 has 1 and 1 + 1 / 128
    rounded = round_stochastically(x, words(0))
    assert rounded.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(rounded, np.float32))) == {1.0, 1 + 1 / 128}
    share = np.mean(np.asarray(rounded, np.float32) > 1)
    assert abs(share - 0.3) < 0.015  # four standard deviations
    again = round_stochastically(x, words(0))
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(again))
    other = round_stochastically(x, words(1))
    both = np.mean(np.asarray(rounded) == np.asarray(other))
    assert abs(both - (0.3**2 + 0.7**2)) < 0.02  # independent of each other
    special = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(
        np.asarray(round_stochastically(special, words(2)), np.float32), special
    )


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", None])
def test_small_updates_add_up(rounding):
    """A thousand updates of 1e-4 to weights of 1, each a fortieth of half a rounding step."""
    inner = optax.sgd(1e-4)
    optimizer = inner if rounding is None else round_to_bfloat16(inner, rounding=rounding, seed=0)
    weights = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones((64, 64), jnp.bfloat16)}
    grads = jax.tree.map(lambda leaf: -jnp.ones(leaf.shape), weights)

    def step(_: Any, carry: tuple) -> tuple:
        weights, state = carry
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    got, _ = jax.jit(partial(jax.lax.fori_loop, 0, 1000, step))((weights, state))
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in got.items()}
    if rounding is None:
        assert np.all(wide["a"] == 1)  # what rounding to nearest would do
        return
    assert abs(wide["a"].mean() - 1.1) < 2e-3
    assert np.ptp(wide["a"]) <= (1 / 128 if rounding == "kahan" else 0.3)
    assert np.array_equal(wide["a"], wide["b"]) == (rounding == "kahan")  # bits differ by name


def test_state_of_bfloat16_weights_is_bfloat16():
    weights = narrow(make_weights())
    state = make_optimizer("stochastic").init(weights)
    moments = state["1"].inner[0]
    for name, dtype in (("ffn.0.weight", jnp.bfloat16), ("modulation", jnp.float32)):
        assert moments.mu[f"blocks.1.{name}"].dtype == dtype
        assert moments.nu[f"blocks.1.{name}"].dtype == dtype
        assert weights[f"blocks.1.{name}"].dtype == dtype
