"""Training all weights: which they are, what their gradients are, and where they lie."""

import functools
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
from wan22_jax.training.rounding import round_to_bfloat16
from wan22_jax.training.step import Frozen, StepSettings, TrainState, compile_train_step
from wan22_jax.weights import parameter_shapes, set_parameters, stacked_shapes, stored_dtype

QUICK = {"xla_backend_optimization_level": 0}  # compiling is all the time these tests take
GOLDEN_CONFIG = TransformerConfig(**SIZES)
CONFIG = TransformerConfig(
    dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, text_len=4, freq_dim=8
)
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
    return jax.make_jaxpr(grad)(weights), jax.jit(grad, compiler_options=QUICK)(weights)


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


def make_weights(dtype: str) -> tuple[nnx.GraphDef, dict, Frozen]:
    graphdef, weights, template = split_full(
        WanTransformer(CONFIG, rngs=nnx.Rngs(0)), dtype="bfloat16"
    )
    return graphdef, place_full(weights, SHARDING, dtype=dtype), Frozen(template)


def make_batch(accumulate: int = 1) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        rng.normal(size=(2, 2, 4, 4, 48)).reshape(accumulate, -1, 2, 4, 4, 48).astype(jnp.bfloat16),
        rng.normal(size=(2, 4, 8)).reshape(accumulate, -1, 4, 8).astype(jnp.bfloat16),
    )


def make_optimizer(rounding: str | None, *, on_host: bool = False) -> BlockwiseOptimizer:
    inner = optax.adamw(1e-3)
    if rounding is not None:
        inner = round_to_bfloat16(inner, rounding=rounding, seed=0)
    return BlockwiseOptimizer(inner, max_grad_norm=0.5, on_host=on_host)


@functools.cache
def take_steps(rounding: str | None, *, on_host: bool, accumulate: int = 1) -> tuple:
    graphdef, weights, frozen = make_weights("float32" if rounding is None else "bfloat16")
    start = jax.tree.map(np.asarray, weights)
    optimizer = make_optimizer(rounding, on_host=on_host)
    step_number = jax.device_put(jnp.zeros((), jnp.int32), SHARDING)
    state = TrainState(step_number, weights, optimizer.place_state(weights, SHARDING))
    step = compile_train_step(
        graphdef,
        optimizer,
        StepSettings(activation_checkpointing=True),
        sharding=SHARDING,
        opt_shardings=jax.tree.map(lambda leaf: leaf.sharding, state.opt_state),
    )
    for _ in range(2):
        state, metrics = step(
            state, frozen, make_batch(accumulate), jax.random.key(0), jnp.asarray(sigma_grid())
        )
    assert step._cache_size() == 1
    return start, state, metrics


@pytest.mark.parametrize("rounding", [None, "kahan"])
def test_state_on_the_host_changes_no_bit(rounding):
    start, near, _ = take_steps(rounding, on_host=False)
    _, far, _ = take_steps(rounding, on_host=True)
    for name, leaf in far.trainable.items():
        assert leaf.dtype == stored_dtype(name, "float32" if rounding is None else "bfloat16")
        assert leaf.sharding.memory_kind == "device"
        assert np.any(np.asarray(leaf) != start[name]), name
    kinds = {(leaf.ndim > 0, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(far.opt_state)}
    assert kinds == {(False, "device"), (True, "pinned_host")}
    for a, b in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
