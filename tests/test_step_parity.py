"""A whole accumulated train step against Diffusers, PEFT and torch, and losses in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.make_step import CASES, GOLDEN, SIGMA_ABT, draw_step
from golden.make_transformer import RANK, SIZES, draw_weights
from safetensors.numpy import save_file
from test_transformer import make_adapter, relative_error

from wan22_jax.adapter import TARGETS, Adapter, attach_adapter, to_tensors
from wan22_jax.batch import Batch
from wan22_jax.checkpoint import flatten_state
from wan22_jax.model.flow import Penalty, sigma_grid, velocity_loss
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.training import step as step_module
from wan22_jax.training.draws import Draws
from wan22_jax.training.step import Frozen, StepSettings, init_state, split_model, train_step
from wan22_jax.weights import load_transformer, parameter_shapes


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("case", CASES)
def test_a_step_matches_pytorch(golden, model, case, monkeypatch):
    """T2V and I2V examples in one step of two micro-batches; all 40 gradients of the adapter."""
    kind, scale, masked = CASES[case]
    inputs = draw_step()
    monkeypatch.setattr(step_module, "draw_examples", partial(give_draws, inputs))
    graphdef, trainable, frozen = split_model(model)
    keeps_gradients = optax.trace(0.0)  # as the optimizer's state
    settings = StepSettings(penalty=Penalty(kind, scale))
    step = jax.jit(
        partial(train_step, graphdef=graphdef, optimizer=keeps_gradients, settings=settings)
    )
    batch = Batch(inputs.latents_ABTYXC, inputs.text_ABSE, inputs.mask_ABYX if masked else None)
    state, metrics = step(
        init_state(trainable, keeps_gradients),
        Frozen(frozen),
        batch,
        jax.random.key(0),
        jnp.asarray(sigma_grid()),
    )
    np.testing.assert_allclose(metrics["loss_AB"], golden[f"loss/{case}"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], golden[f"loss/{case}"].mean(), rtol=1e-5)
    np.testing.assert_array_equal(metrics["task_AB"], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(metrics["sigma_AB"], SIGMA_ABT.max(axis=2))
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_state(state.opt_state.trace).items()}
    gradients = to_tensors(
        Adapter(arrays, dict.fromkeys(TARGETS, float(RANK)), metadata={}, source="")
    )
    expected = {
        name.removeprefix(f"gradient/{case}/"): array
        for name, array in golden.items()
        if name.startswith(f"gradient/{case}/")
    }
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 40
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    norm = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in expected.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_the_cases_differ(golden):
    losses = [golden[f"loss/{case}"] for case in CASES]
    for number, one in enumerate(losses):
        assert all(np.abs(one / other - 1).min() > 0.02 for other in losses[:number])


def give_draws(inputs, _step_key, positions_B, **_) -> Draws:
    """Stands in for ``draw_examples``: torch does not draw what JAX draws."""
    arrays = (inputs.noise_ABTYXC, inputs.sigma_ABT, inputs.weight_ABT)
    return Draws(*(jnp.asarray(x.reshape(-1, *x.shape[2:]))[positions_B] for x in arrays))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> WanTransformer:
    config = TransformerConfig(**SIZES)
    shapes = parameter_shapes(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
    path = tmp_path_factory.mktemp("transformer") / "official.safetensors"
    save_file(draw_weights(shapes), path)
    model = load_transformer(path, config)
    attach_adapter(model, make_adapter(shapes))
    return model


@pytest.mark.parametrize("kind", ["huber", "smooth_l1", "pseudo_huber"])
@pytest.mark.parametrize("scale", [0.05, 0.7, 30.0])
def test_penalties_against_float64(kind, scale):
    error = np.concatenate(
        [[0, scale, -scale, 1e-3, -1e-4], np.random.default_rng(0).normal(size=500) * 3]
    ).astype(np.float32)
    r = error.astype(np.float64)
    expected = {
        "huber": np.where(np.abs(r) <= scale, r**2 / 2, scale * (np.abs(r) - scale / 2)),
        "smooth_l1": np.where(np.abs(r) < scale, r**2 / 2 / scale, np.abs(r) - scale / 2),
        "pseudo_huber": np.sqrt(r**2 + scale**2) - scale,
    }[kind]
    penalty = Penalty(kind, scale)
    got = jax.jit(penalty)(error)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-12)
    slope = jax.vmap(jax.grad(penalty))(jnp.asarray(error))
    expected_slope = {
        "huber": np.clip(r, -scale, scale),
        "smooth_l1": np.clip(r / scale, -1, 1),
        "pseudo_huber": r / np.sqrt(r**2 + scale**2),
    }[kind]
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["squared", "huber", "smooth_l1", "pseudo_huber"])
def test_mask_and_frame_weight_apply_to_every_penalty(kind):
    rng = np.random.default_rng(0)
    velocity, clean, noise = rng.normal(size=(3, 2, 3, 4, 6, 5)).astype(np.float32)
    weight_BT = np.array([[1, 1, 1], [0, 1, 0]], np.float32)
    mask_BYX = (rng.integers(0, 5, (2, 4, 6)) / 4).astype(np.float32)
    penalty = Penalty(kind, 0.6)
    cost = np.asarray(penalty(jnp.asarray(velocity - (noise - clean))), np.float64)
    cost *= mask_BYX[:, None, :, :, None]
    expected = [cost[0].mean(), cost[1, 1].mean()]
    got = velocity_loss(
        *map(jnp.asarray, (velocity, clean, noise, weight_BT, mask_BYX)), penalty=penalty
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("scale", [0.05, 0.7, 30.0])
def test_penalties_are_those_of_torch(scale):
    torch = pytest.importorskip("torch")
    error = np.random.default_rng(0).normal(size=500).astype(np.float32) * 3
    zero, given = torch.zeros(500), torch.from_numpy(error)
    functional = torch.nn.functional
    huber = functional.huber_loss(given, zero, reduction="none", delta=scale)
    smooth = functional.smooth_l1_loss(given, zero, reduction="none", beta=scale)
    np.testing.assert_allclose(
        Penalty("huber", scale)(jnp.asarray(error)), huber.numpy(), rtol=2e-6
    )
    np.testing.assert_allclose(
        Penalty("smooth_l1", scale)(jnp.asarray(error)), smooth.numpy(), rtol=2e-6
    )
