"""The train step: what it draws, what it trains, and that it does so once, exactly."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from wan22_jax.batch import Batch
from wan22_jax.checkpoint import flatten_state, open_checkpoints, restore_state
from wan22_jax.model.flow import SQUARED, sigma_grid
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.draws import Draws, TaskMix, draw_example
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.optimizer import make_optimizer
from wan22_jax.training.optimizer_options import AdamW
from wan22_jax.training.step import (
    Frozen,
    StepSettings,
    TrainState,
    compile_train_step,
    init_state,
    loss_fn,
    split_model,
)

CONFIG = TransformerConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
)
GRID = jnp.asarray(sigma_grid())
SEED = jax.random.key(3)


def make_model(*, rank: int = 2, alpha: float = 6.0) -> WanTransformer:
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.add_lora(jax.random.key(1), rank=rank, alpha=alpha)
    return model


def fill_lora_b(trainable: nnx.State) -> nnx.State:
    """Gives the zero B matrices values, so that the adapter acts."""
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, trainable
    )


def make_batch(seed: int, *, accumulate: int = 1, size: int = 2, frames: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(accumulate, size, frames, 4, 4, 48)).astype(jnp.bfloat16),
        rng.normal(size=(accumulate, size, 6, 8)).astype(jnp.bfloat16),
    )


def make_mask(lead: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 3, (*lead, 4, 4)).astype(jnp.bfloat16) / 2


@functools.cache
def make_step(*, i2v_fraction: float = 0.5, lr: float = 1e-2):
    """The compiled step, its frozen weights and a function that makes fresh states for it."""
    sharding = replicated(make_mesh())
    graphdef, trainable, frozen = split_model(make_model())
    schedule = optax.linear_schedule(lr / 4, lr, 4)
    optimizer = make_optimizer(AdamW(), schedule=schedule, gradient_clipping=1.0)
    placed = place_frozen(
        frozen, activation_checkpointing=False, blocks_to_swap=0, sharding=sharding
    )

    def make_state() -> TrainState:
        fresh = jax.tree.map(jnp.copy, trainable)
        return jax.device_put(init_state(fresh, optimizer), sharding)

    step = compile_train_step(
        graphdef,
        optimizer,
        StepSettings(TaskMix(i2v_fraction)),
        state=make_state(),
        frozen=placed,
    )
    return make_state, placed, step


def make_run(**options):
    make_state, frozen, step = make_step(**options)
    return make_state(), frozen, step


def draw_batch(size: int, frames: int, i2v_fraction: float) -> Draws:
    draw = partial(
        draw_example,
        sigma_grid=GRID,
        shape_TYXC=(frames, 4, 4, 48),
        tasks=TaskMix(i2v_fraction),
    )
    return jax.vmap(draw)(jax.random.split(jax.random.key(7), size))


def mean_loss(graphdef, activation_checkpointing=False):
    settings = StepSettings(activation_checkpointing=activation_checkpointing)
    return lambda *args, **named: loss_fn(*args, graphdef=graphdef, settings=settings, **named)[0]


def assert_same(left: TrainState, right: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_learns_and_only_the_adapter_moves():
    state, frozen, step = make_run(i2v_fraction=0.0, lr=5e-2)
    before = jax.tree.map(np.asarray, frozen)
    batch = make_batch(0)
    graphdef, start, _ = split_model(make_model())
    held_out = (*(jnp.asarray(x[0]) for x in batch[:2]), draw_batch(2, 3, 0.0))
    loss = jax.jit(mean_loss(graphdef))
    for _ in range(100):
        state, _ = step(state, frozen, batch, SEED, GRID)
    assert int(state.step) == 100
    # Not near zero: a width of 32 cannot carry the 192 numbers of a token's noise.
    trained = loss(state.trainable, frozen, *held_out)
    assert float(trained) < 0.9 * float(loss(start, frozen, *held_out))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_accumulated_micro_batches_equal_one_batch(masked):
    batch = make_batch(0, accumulate=1, size=4)
    if masked:
        batch = batch._replace(mask_ABYX=make_mask((1, 4)))
    split = jax.tree.map(lambda x: x.reshape(4, 1, *x.shape[2:]), batch)
    state, frozen, step = make_run()
    whole, metrics_whole = step(state, frozen, batch, SEED, GRID)
    state, frozen, step = make_run()
    parts, metrics_parts = step(state, frozen, split, SEED, GRID)
    np.testing.assert_allclose(metrics_whole["loss"], metrics_parts["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics_whole["grad_norm"], metrics_parts["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_mask_reaches_the_loss_and_the_gradient():
    state, frozen, step = make_run()
    batch = make_batch(0)
    _, plain = step(jax.tree.map(jnp.copy, state), frozen, batch, SEED, GRID)
    found = {}
    for name, mask in (
        ("ones", np.ones((1, 2, 4, 4), jnp.bfloat16)),
        ("half", np.full((1, 2, 4, 4), 0.5, jnp.bfloat16)),
        ("zeros", np.zeros((1, 2, 4, 4), jnp.bfloat16)),
        ("drawn", make_mask((1, 2))),
    ):
        masked = batch._replace(mask_ABYX=mask)
        _, metrics = step(jax.tree.map(jnp.copy, state), frozen, masked, SEED, GRID)
        found[name] = metrics
    for metric in ("loss", "grad_norm"):
        np.testing.assert_allclose(found["ones"][metric], plain[metric], rtol=1e-6)
        np.testing.assert_allclose(found["half"][metric], plain[metric] / 2, rtol=1e-5)
        assert found["zeros"][metric] == 0
        assert 0 < found["drawn"][metric] < 0.9 * plain[metric]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_mask_the_program_is_that_of_the_plain_mean(accumulate, monkeypatch):
    def lower(batch: Batch) -> str:
        make_state, frozen, step = make_step.__wrapped__()
        return step.lower(make_state(), frozen, batch, SEED, GRID).as_text()

    def plain_loss(velocity, clean, noise, weight_BT, mask_BYX, *, penalty):
        assert mask_BYX is None
        assert penalty == SQUARED
        error = velocity.astype(jnp.float32) - (
            noise.astype(jnp.float32) - clean.astype(jnp.float32)
        )
        frame_loss_BT = jnp.mean(jnp.square(error), axis=(2, 3, 4))
        return jnp.sum(frame_loss_BT * weight_BT, axis=1) / jnp.sum(weight_BT, axis=1)

    batch = make_batch(0, accumulate=accumulate)
    without = lower(batch)
    assert lower(batch._replace(mask_ABYX=make_mask((accumulate, 2)))) != without
    monkeypatch.setattr("wan22_jax.training.step.velocity_loss", plain_loss)
    assert lower(batch) == without


def test_compiles_once_for_each_shape():
    make_state, frozen, step = make_step.__wrapped__()
    state = make_state()
    for seed in range(3):
        state, _ = step(state, frozen, make_batch(seed), SEED, GRID)
    assert step._cache_size() == 1
    for seed in range(2):
        state, _ = step(state, frozen, make_batch(seed, frames=1), SEED, GRID)
    assert step._cache_size() == 2


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    state, frozen, step = make_run()
    for seed in range(6):
        state, _ = step(state, frozen, make_batch(seed), SEED, GRID)
        if seed == 2:
            with open_checkpoints(tmp_path) as manager:
                manager.save(state, {"note": "half way"})
    make_state, frozen, step = make_step.__wrapped__()
    again = make_state()
    with open_checkpoints(tmp_path) as manager:
        again, meta = restore_state(manager, again)
    assert meta["note"] == "half way"
    assert int(again.step) == meta["step"] == 3
    for seed in range(3, 6):
        again, _ = step(again, frozen, make_batch(seed), SEED, GRID)
    assert_same(state, again)
    assert step._cache_size() == 1  # restored arrays must not cost a second compilation
    assert any(np.any(leaf) for leaf in jax.tree.leaves(again.opt_state))


def test_draws_depend_on_seed_step_and_position():
    state, frozen, step = make_run()
    batch = make_batch(0)
    first = step(jax.tree.map(jnp.copy, state), frozen, batch, SEED, GRID)[1]["loss"]
    same = step(jax.tree.map(jnp.copy, state), frozen, batch, SEED, GRID)[1]["loss"]
    seed = step(jax.tree.map(jnp.copy, state), frozen, batch, jax.random.key(4), GRID)[1]["loss"]
    later = state._replace(step=state.step + 1)
    other = step(jax.tree.map(jnp.copy, later), frozen, batch, SEED, GRID)[1]["loss"]
    assert first == same
    assert len({float(first), float(seed), float(other)}) == 3
    draws = draw_batch(2, 3, 0.0)
    assert draws.sigma_T[0, 0] != draws.sigma_T[1, 0]
    assert np.any(draws.noise_TYXC[0] != draws.noise_TYXC[1])


def test_image_to_video_gives_the_first_frame_and_leaves_it_out_of_the_loss():
    draws = draw_batch(2, 3, 1.0)
    np.testing.assert_array_equal(draws.sigma_T[:, 0], 0)
    np.testing.assert_array_equal(draws.weight_T, [[0, 1, 1], [0, 1, 1]])
    assert np.all(np.asarray(draws.sigma_T[:, 1:]) > 0)

    graphdef, trainable, frozen = split_model(make_model())
    latents_BTYXC, text_BSE = (jnp.asarray(x[0]) for x in make_batch(0)[:2])
    loss = partial(mean_loss(graphdef), fill_lora_b(trainable), Frozen(frozen), text_BSE=text_BSE)
    louder = draws._replace(noise_TYXC=draws.noise_TYXC.at[:, 0].mul(100.0))
    assert loss(latents_BTYXC, draws=draws) == loss(latents_BTYXC, draws=louder)
    # ... while for text-to-video the same change is seen, and so is another given frame.
    t2v = draw_batch(2, 3, 0.0)
    assert np.all(np.asarray(t2v.weight_T) == 1)
    louder = t2v._replace(noise_TYXC=t2v.noise_TYXC.at[:, 0].mul(100.0))
    assert loss(latents_BTYXC, draws=t2v) != loss(latents_BTYXC, draws=louder)
    assert loss(latents_BTYXC, draws=draws) != loss(latents_BTYXC.at[:, 0].add(1), draws=draws)


def test_images_are_never_image_to_video():
    draws = draw_batch(64, 1, 1.0)
    assert np.all(np.asarray(draws.sigma_T) > 0)
    assert np.all(np.asarray(draws.weight_T) == 1)


def test_share_of_image_to_video_examples():
    weight_BT = draw_batch(2000, 2, 0.2).weight_T
    assert 0.17 < 1 - float(weight_BT[:, 0].mean()) < 0.23


def test_loss_is_the_plain_mean_of_the_trained_frames():
    graphdef, trainable, frozen = split_model(make_model())
    latents_BTYXC, text_BSE = (jnp.asarray(x[0]) for x in make_batch(0)[:2])
    draws = draw_batch(2, 3, 0.0)
    draws = draws._replace(  # one example of each task
        sigma_T=draws.sigma_T.at[1, 0].set(0), weight_T=draws.weight_T.at[1, 0].set(0)
    )
    clean = np.asarray(latents_BTYXC, np.float64)
    noise, sigma = np.asarray(draws.noise_TYXC, np.float64), np.asarray(draws.sigma_T)
    mixed = (1 - sigma[..., None, None, None]) * clean + sigma[..., None, None, None] * noise
    model = nnx.merge(graphdef, trainable, frozen)
    velocity = model(jnp.asarray(mixed, jnp.float32), draws.sigma_T, text_BSE.astype(jnp.float32))
    error = np.asarray(velocity) - (noise - clean)
    expected = (np.mean(error[0] ** 2) + np.mean(error[1, 1:] ** 2)) / 2
    got = mean_loss(graphdef)(trainable, Frozen(frozen), latents_BTYXC, text_BSE, draws)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.long
def test_recomputing_blocks_changes_no_bit():
    """Bit for bit op by op; compiled, the same up to how XLA fuses the two programs."""
    graphdef, trainable, frozen = split_model(make_model())
    trainable = fill_lora_b(trainable)
    latents_BTYXC, text_BSE = (jnp.asarray(x[0][:1, :1]) for x in make_batch(0)[:2])
    draws = jax.tree.map(lambda x: x[:1, :1], draw_batch(1, 3, 0.0))
    args = (trainable, Frozen(frozen), latents_BTYXC, text_BSE, draws)
    eager, compiled = {}, {}
    for remat in (False, True):
        loss = mean_loss(graphdef, remat)
        assert ("remat" in str(jax.make_jaxpr(loss)(*args))) is remat
        compiled[remat] = jax.jit(jax.value_and_grad(loss))(*args)
        with jax.disable_jit():
            eager[remat] = jax.value_and_grad(loss)(*args)
    for a, b in zip(jax.tree.leaves(eager[False]), jax.tree.leaves(eager[True]), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(np.asarray(a))
    for a, b in zip(jax.tree.leaves(compiled[False]), jax.tree.leaves(compiled[True]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(np.asarray(a)).max())


def test_fresh_adapter_changes_nothing_and_a_trained_one_does():
    latents_BTYXC = jnp.asarray(make_batch(0).latents_ABTYXC[0], jnp.float32)
    args = (latents_BTYXC, jnp.full((2, 3), 0.5), jnp.ones((2, 4, 8)))
    base = WanTransformer(CONFIG, rngs=nnx.Rngs(0))(*args)
    graphdef, trainable, frozen = split_model(make_model())
    np.testing.assert_array_equal(nnx.merge(graphdef, trainable, frozen)(*args), base)
    trained = nnx.merge(graphdef, fill_lora_b(trainable), frozen)(*args)
    assert np.abs(np.asarray(trained - base)).max() > 1e-3


@pytest.mark.parametrize("alpha", [2.0, 5.0])
@pytest.mark.parametrize("missing", [(), ("q", "o"), ("k", "v")])
def test_adapter_equals_merged_weights(alpha, missing):
    model = make_model(rank=2, alpha=alpha)
    graphdef, trainable, frozen = split_model(model)
    model = nnx.merge(graphdef, fill_lora_b(trainable), frozen)
    for attention in (model.blocks.self_attn, model.blocks.cross_attn):
        for name in missing:
            linear = getattr(attention, name)
            linear.lora_A = linear.lora_B = None
    args = (jnp.ones((1, 2, 4, 4, 48)), jnp.full((1, 2), 0.5), jnp.ones((1, 4, 8)))
    branch = model(*args)
    for _, linear in model.lora_targets():
        if linear.lora_A is None:
            continue
        delta = (alpha / 2) * jnp.einsum("nor,nri->noi", linear.lora_B[...], linear.lora_A[...])
        linear.weight[...] = linear.weight[...] + delta
        linear.lora_A = linear.lora_B = None
    np.testing.assert_allclose(model(*args), branch, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_16_bit_model_are_not_rounded_to_it():
    graphdef, trainable, frozen = split_model(make_model())
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    latents_BTYXC, text_BSE = (jnp.asarray(x[0]) for x in make_batch(0)[:2])
    gradients = jax.grad(mean_loss(graphdef, True))(
        fill_lora_b(trainable),
        Frozen(frozen),
        latents_BTYXC,
        text_BSE,
        draw_batch(2, 3, 0.0),
    )
    for name, leaf in flatten_state(gradients).items():
        assert leaf.dtype == jnp.float32, name
        assert np.mean(leaf == leaf.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1, name


def test_adapter_covers_the_ten_linears_of_each_block():
    paths = [path for path, _ in make_model().lora_targets()]
    assert paths == sorted(
        [f"blocks.{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"]
        + ["blocks.ffn.0", "blocks.ffn.2"]
    )
    _, trainable, _ = split_model(make_model())
    arrays = flatten_state(trainable)
    assert arrays["blocks.ffn.0.lora_A"].shape == (2, 2, 32)
    assert arrays["blocks.ffn.0.lora_B"].shape == (2, 48, 2)
    assert len(arrays) == 20
    # Kaiming-uniform with a = sqrt(5): within 1 / sqrt(in), each layer its own draw.
    matrix = np.asarray(arrays["blocks.ffn.2.lora_A"])
    assert 0.8 / np.sqrt(48) < np.abs(matrix).max() <= 1 / np.sqrt(48)
    assert np.any(matrix[0] != matrix[1])
