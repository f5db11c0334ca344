"""Schedules, solvers and sampling loops against Diffusers and the facts of the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_sampling import CASES, GOLDEN, GUIDANCE, SHAPE, SHIFT, toy_velocity
from jax.sharding import AxisType, Mesh

from wan22_jax import sampling
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sampling import sample_latents, sigma_schedule, solver_weights
from wan22_jax.sharding import replicated


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def velocity(latents_BTYXC, sigma_BT, text_BSE):
    return toy_velocity(latents_BTYXC, sigma_BT, text_BSE, xp=jnp)


class Recorder:
    """A model that remembers what it was shown."""

    def __init__(self):
        self.latents, self.sigmas, self.texts = [], [], []

    def __call__(self, latents_BTYXC, sigma_BT, text_BSE):
        self.latents.append(np.asarray(latents_BTYXC))
        self.sigmas.append(np.asarray(sigma_BT))
        self.texts.append(np.asarray(text_BSE))
        return velocity(latents_BTYXC, sigma_BT, text_BSE)


def draw(golden, model=velocity, *, mode="t2v", solver="unipc", steps=4, **changes):
    arguments = {
        "shape": SHAPE,
        "solver": solver,
        "steps": steps,
        "shift": SHIFT,
        "guidance": GUIDANCE,
        "key": None,
        "noise": golden["noise"],
        "first_frame": golden["first_frame"] if mode == "i2v" else None,
    } | changes
    return np.asarray(sample_latents(model, golden["text"], golden["negative"], **arguments))


def relative_error(got, wanted):
    return np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()


def test_schedule_has_the_original_values():
    sigmas, timesteps = sigma_schedule("unipc", 50, 5.0)
    assert sigmas.dtype == np.float32
    assert len(sigmas) == 51
    np.testing.assert_allclose(sigmas[:3], [0.99980, 0.99573, 0.99153], atol=5e-6)
    np.testing.assert_allclose(sigmas[-3:], [0.17227, 0.09251, 0], atol=5e-6)
    assert timesteps[:4].tolist() == [999, 995, 991, 987]
    assert timesteps[-2:].tolist() == [172, 92]

    sigmas, timesteps = sigma_schedule("dpm++", 50, 5.0)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert timesteps[:3].tolist() == [1000, 995, 991]
    assert timesteps[-2:].tolist() == [172, 92]


@pytest.mark.parametrize("case", CASES)
def test_schedule_equals_reference_bit_for_bit(golden, case):
    _, solver, steps = CASES[case]
    sigmas, timesteps = sigma_schedule(solver, steps, SHIFT)
    np.testing.assert_array_equal(sigmas, golden[f"{case}/sigmas"])
    np.testing.assert_array_equal(timesteps, golden[f"{case}/timesteps"])


def test_shift_one_leaves_the_line_straight():
    sigmas, _ = sigma_schedule("dpm++", 4, 1.0)
    assert sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("solver", "steps", "shift"), [("euler", 4, 5.0), ("unipc", 0, 5.0), ("unipc", 4, 0.0)]
)
def test_schedule_refuses(solver, steps, shift):
    with pytest.raises(ValueError, match=r"solver is|expected steps"):
        # Past the annotations: the check is for callers that have none.
        getattr(sigma_schedule, "__wrapped__", sigma_schedule)(solver, steps, shift)


@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_diffusers(golden, case):
    mode, solver, steps = CASES[case]
    model = Recorder()
    latents = draw(golden, model, mode=mode, solver=solver, steps=steps)
    assert latents.dtype == np.float32
    assert len(model.latents) == 2 * steps
    seen = np.stack([*model.latents[::2], latents])
    np.testing.assert_array_equal(seen[:-1], model.latents[1::2])
    for got, wanted in zip(seen, golden[f"{case}/samples"], strict=True):
        assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solvers_are_second_order(golden, solver, monkeypatch):
    def gaussian(latents_BTYXC, sigma_BT, _):  # clean latents are drawn from N(0, 1/2)
        sigma = sigma_BT[0, 0]
        return latents_BTYXC * (sigma - (1 - sigma) / 2) / ((1 - sigma) ** 2 / 2 + sigma**2)

    def first_order(solver, sigmas, step):
        return solver_weights(solver, sigmas[step : step + 2], 0)

    exact = golden["noise"] * np.sqrt(1 / 2)
    second = draw(golden, gaussian, solver=solver, steps=20, shift=1.0)
    monkeypatch.setattr(sampling, "solver_weights", first_order)
    first = draw(golden, gaussian, solver=solver, steps=20, shift=1.0)
    assert relative_error(second, exact) < relative_error(first, exact) / 5


def test_unipc_corrects(golden, monkeypatch):
    def skip_correction(solver, sigmas, step):
        weights = solver_weights(solver, sigmas, step)
        return weights._replace(correct=jnp.array([1.0, 0, 0, 0, 0]))

    corrected = draw(golden, steps=10)
    monkeypatch.setattr(sampling, "solver_weights", skip_correction)
    assert relative_error(draw(golden, steps=10), corrected) > 1e-3


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_last_step_is_the_clean_prediction(solver):
    sigmas, _ = sigma_schedule(solver, 6, SHIFT)
    assert solver_weights(solver, sigmas, 5).predict.tolist() == [0, 0, 1]


def test_first_frame_stays_and_is_called_clean(golden):
    model = Recorder()
    latents = draw(golden, model, mode="i2v", steps=4)
    _, timesteps = sigma_schedule("unipc", 4, SHIFT)
    for seen in (*model.latents, latents):
        np.testing.assert_array_equal(seen[:, :1], golden["first_frame"].astype(np.float32))
    for sigma_BT, timestep in zip(model.sigmas[::2], timesteps, strict=True):
        np.testing.assert_array_equal(sigma_BT, np.float32([[0, timestep / 1000, timestep / 1000]]))
    assert np.abs(latents - draw(golden, steps=4)).max() > 0.1


def test_text_to_video_has_one_sigma_for_all_frames(golden):
    model = Recorder()
    draw(golden, model, solver="dpm++", steps=3)
    _, timesteps = sigma_schedule("dpm++", 3, SHIFT)
    np.testing.assert_array_equal(
        np.stack(model.sigmas[::2]), np.float32(timesteps[:, None, None] / 1000).repeat(3, -1)
    )


def test_guidance_moves_from_negative_to_text(golden):
    text, negative = (float(golden[name].mean()) for name in ("text", "negative"))

    def text_only(latents_BTYXC, _, text_BSE):
        return jnp.zeros_like(latents_BTYXC) + jnp.mean(text_BSE)

    # One DPM++ step from sigma 1 to 0: result = noise - velocity.
    latents = draw(golden, text_only, solver="dpm++", steps=1, guidance=4.0)
    np.testing.assert_allclose(
        latents, golden["noise"] - (negative + 4 * (text - negative)), rtol=1e-5, atol=1e-5
    )


def test_guidance_one_needs_no_negative(golden):
    model = Recorder()
    alone = draw(golden, model, guidance=1.0)
    assert len(model.texts) == 4
    assert all((text == golden["text"].astype(np.float32)).all() for text in model.texts)
    np.testing.assert_allclose(alone, draw(golden, guidance=1.0 + 1e-6), atol=1e-4)


def test_key_draws_the_noise(golden):
    key = jax.random.key(7)
    noise = jax.random.normal(key, SHAPE)
    drawn = draw(golden, key=key, noise=None)
    np.testing.assert_array_equal(drawn, draw(golden, noise=noise))
    assert np.abs(drawn - draw(golden, key=jax.random.key(8), noise=None)).max() > 0.1


def test_noise_of_another_shape_is_refused(golden):
    with pytest.raises(ValueError, match="noise has shape"):
        draw(golden, noise=golden["noise"][:, :2])


TINY = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8,
    text_len=6, freq_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformer():
    return WanTransformer(TINY, rngs=nnx.Rngs(0))


def draw_tiny(model, *, seed=0, **changes):
    text, negative, noise, first_frame = (
        jax.random.normal(jax.random.key(seed + i), shape)
        for i, shape in enumerate([(2, 3, 8), (2, 5, 8), (2, 3, 4, 6, 4), (1, 1, 4, 6, 4)])
    )
    arguments = {
        "shape": noise.shape,
        "solver": "unipc",
        "steps": 3,
        "shift": 5.0,
        "guidance": 2.0,
        "key": None,
        "noise": noise,
        "first_frame": first_frame,
    } | changes
    return np.asarray(sample_latents(model, text, negative, **arguments))


def test_transformer_is_compiled_once(transformer, monkeypatch):
    traces = []
    forward = WanTransformer.__call__

    def counted(self, *inputs, **options):
        traces.append((inputs[-1].shape, options))
        return forward(self, *inputs, **options)

    monkeypatch.setattr(WanTransformer, "__call__", counted)
    compiled = draw_tiny(transformer)
    draw_tiny(transformer, seed=9, steps=5)
    # One trace for each length of text, whatever the number of steps and calls.
    assert [shape for shape, _ in traces] == [(2, 3, 8), (2, 5, 8)]
    wanted = {"float32_residual": True, "differentiable": False}
    assert all(options == wanted for _, options in traces)

    plain = jax.jit(lambda *inputs: forward(transformer, *inputs, float32_residual=True))
    assert relative_error(compiled, draw_tiny(plain)) < 1e-5
    assert np.abs(compiled).max() > 0.1


def test_weights_are_an_argument_of_the_compiled_model(transformer):
    before = draw_tiny(transformer)
    graphdef, state = nnx.split(transformer)
    doubled = nnx.merge(graphdef, jax.tree.map(lambda leaf: 2 * leaf, state))
    assert np.abs(draw_tiny(doubled) - before).max() > 0.1


def test_every_step_runs_the_same_program(transformer):
    # Weights from disk are committed to a device, noise is not until it has met them.
    graphdef, state = nnx.split(transformer)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    for sharding in (jax.sharding.SingleDeviceSharding(jax.devices()[1]), replicated(mesh)):
        model = nnx.merge(graphdef, jax.device_put(state, sharding))
        draw_tiny(model, steps=1)
        programs = sampling._run_module._cache_size()
        draw_tiny(model, steps=3)
        assert sampling._run_module._cache_size() == programs
