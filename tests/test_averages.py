"""Averages of the weights: what they are, that they survive a checkpoint, and who exports them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from convert.export import export_adapter
from wan22_jax.batch import Batch
from wan22_jax.checkpoint import (
    flatten_state,
    open_checkpoints,
    read_trainable,
    restore_state,
)
from wan22_jax.errors import BadInput
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.averages import evaluation_weights
from wan22_jax.training.optimizer import make_optimizer
from wan22_jax.training.optimizer_options import AdamW, ScheduleFreeAdamW
from wan22_jax.training.step import (
    Frozen,
    StepSettings,
    compile_train_step,
    init_state,
    split_model,
)

CONFIG = TransformerConfig(
    dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
)
DECAY, LR = 0.7, 1e-2
META = {"rank": 2, "alpha": 6.0, "base_digest": "d", "config": {"adapter": {"dtype": "float32"}}}


def make_parts():
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.add_lora(jax.random.key(1), rank=2, alpha=6.0)
    return split_model(model)


def host(state: nnx.State) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_state(state).items()}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Weights after each of five steps, the last state, and the run folder with a checkpoint."""
    run_dir, sharding = tmp_path_factory.mktemp("run"), replicated(make_mesh())
    graphdef, trainable, frozen = make_parts()
    optimizer = make_optimizer(AdamW(), schedule=optax.constant_schedule(LR), gradient_clipping=1.0)
    settings = StepSettings(ema_decay=DECAY)
    state = jax.device_put(init_state(trainable, optimizer, ema_decay=DECAY), sharding)
    frozen = Frozen(jax.device_put(frozen, sharding))
    step = compile_train_step(graphdef, optimizer, settings, state=state, frozen=frozen)
    rng = np.random.default_rng(0)
    history = [host(state.trainable)]
    with open_checkpoints(run_dir) as manager:
        for _ in range(4):
            batch = Batch(
                rng.normal(size=(1, 1, 2, 4, 4, 48)).astype(jnp.bfloat16),
                rng.normal(size=(1, 1, 6, 8)).astype(jnp.bfloat16),
            )
            state, _ = step(state, frozen, batch, jax.random.key(3), jnp.asarray(sigma_grid()))
            history.append(host(state.trainable))
        manager.save(state, META)
    return history, state, run_dir


def test_the_average_is_that_of_the_recursion(averaged):
    history, state, _ = averaged
    for name, average in host(state.ema).items():
        wanted = history[0][name].astype(np.float64)
        for weights in history[1:]:
            wanted = DECAY * wanted + (1 - DECAY) * weights[name]
        assert average.dtype == np.float32
        np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-8)
        assert np.abs(average - history[-1][name]).max() > LR / 10  # lags behind


def test_the_average_survives_a_checkpoint_to_the_bit(averaged):
    _, state, run_dir = averaged
    _, trainable, _ = make_parts()
    optimizer = make_optimizer(AdamW(), schedule=optax.constant_schedule(LR), gradient_clipping=1.0)
    with open_checkpoints(run_dir) as manager:
        again, _ = restore_state(manager, init_state(trainable, optimizer, ema_decay=0.5))
        without, _ = restore_state(manager, init_state(trainable, optimizer))
    assert without.ema is None
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_did_not_average_may_start_to(tmp_path):
    _, trainable, _ = make_parts()
    optimizer = make_optimizer(AdamW(), schedule=optax.constant_schedule(LR), gradient_clipping=0.0)
    with open_checkpoints(tmp_path) as manager:
        manager.save(init_state(trainable, optimizer), META)
    fresh = jax.tree.map(lambda leaf: leaf + 1, trainable)
    with open_checkpoints(tmp_path) as manager:
        again, _ = restore_state(manager, init_state(fresh, optimizer, ema_decay=0.5))
    for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(again.ema), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(BadInput, match=r"holds no average, ema_decay was not set; leave --ema out"):
        export_adapter(tmp_path, tmp_path / "lora.safetensors", ema=True)


def test_export_takes_the_average_when_told(averaged, tmp_path):
    history, state, run_dir = averaged
    for ema, weights in ((False, history[-1]), (True, host(state.ema))):
        out = tmp_path / f"{ema}.safetensors"
        adapter = export_adapter(run_dir, out, ema=ema).adapter
        for name, matrix in adapter.matrices.items():
            np.testing.assert_array_equal(matrix, weights[name])


def test_a_schedule_free_run_evaluates_and_exports_its_average(tmp_path):
    _, trainable, _ = make_parts()
    for clipping, folder in ((0.0, tmp_path / "a"), (1.0, tmp_path / "b")):
        optimizer = make_optimizer(
            ScheduleFreeAdamW(), schedule=lambda k: LR * (k + 1), gradient_clipping=clipping
        )
        state = init_state(trainable, optimizer)
        opt_state, weights = state.opt_state, trainable
        for step in range(3):
            gradients = jax.tree.map(lambda p, s=step: jnp.cos(p * (7 + s)), weights)
            updates, opt_state = optimizer.update(gradients, opt_state, weights)
            weights = optax.apply_updates(weights, updates)
        state = state._replace(step=jnp.int32(3), trainable=weights, opt_state=opt_state)
        (free,) = (node for node in (opt_state if clipping else [opt_state]) if hasattr(node, "z"))
        averages = host(evaluation_weights(state))
        for name, y in host(weights).items():
            z = np.asarray(free.z[f"{name}.value"], np.float64)
            np.testing.assert_allclose(averages[name], (y - 0.1 * z) / 0.9, rtol=1e-5, atol=1e-7)
            assert np.abs(averages[name] - y).max() > LR / 100
        meta = META | {"config": {"optimizer": {"type": "ScheduleFreeAdamW"}}}
        folder.mkdir()
        with open_checkpoints(folder) as manager:
            manager.save(state, meta)
        saved, _ = read_trainable(folder)
        for name, average in averages.items():
            np.testing.assert_allclose(saved[name], average, rtol=1e-6, atol=1e-8)


def test_other_optimizers_evaluate_the_weights_themselves(averaged):
    _, state, _ = averaged
    assert evaluation_weights(state) is state.trainable
