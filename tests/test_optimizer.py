"""Schedules and optimizers, against PyTorch where it has them and NumPy in float64 elsewhere."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wan22_jax.config import load_config
from wan22_jax.errors import BadInput
from wan22_jax.training import optimizer_options as kinds
from wan22_jax.training.optimizer import (
    describe_optimizer,
    make_optimizer,
    make_schedule,
)
from wan22_jax.training.optimizer_options import optimizer_metrics

CONFIG = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 1
[model]
ckpt_path = 'model'
[adapter]
rank = 2
"""
STEPS = 5


@pytest.fixture
def read(tmp_path):
    """Reads a config with some overrides."""
    (tmp_path / "c.toml").write_text(CONFIG)
    return lambda *overrides: load_config(tmp_path / "c.toml", overrides)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def run(options: kinds.Options, params: dict, gradients: list[dict], *, lr=0.1, **settings):
    """Runs an optimizer; returns the parameters after every step and the last state."""
    schedule = lr if callable(lr) else optax.constant_schedule(lr)
    optimizer = make_optimizer(
        options, **{"schedule": schedule, "gradient_clipping": 0.0, **settings}
    )
    as32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    params, state = as32(params), optimizer.init(as32(params))
    update = jax.jit(optimizer.update)
    history = []
    for gradient in gradients:
        updates, state = update(as32(gradient), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.tree.map(np.asarray, params))
    return history, state


# --- schedules ------------------------------------------------------------------------------------


def reference_schedule(k, *, lr, warmup, total, kind, lr_min):
    if k < warmup:
        return lr * (1 / warmup + (1 - 1 / warmup) * k / warmup)
    part = min((k - warmup) / max(1, total - warmup), 1)
    if kind == "linear":
        return lr * (1 - part)
    if kind == "cosine":
        return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * part)) / 2
    return lr


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 100, 2000])
def test_schedules_are_those_of_the_formulas(kind, warmup, read):
    config = read("lr=2e-5", f"warmup_steps={warmup}", f"lr_scheduler={kind}")
    schedule = make_schedule(config, total_steps=1000)
    for k in (0, 1, 50, 99, 100, 101, 500, 999, 1000, 1999):
        wanted = reference_schedule(k, lr=2e-5, warmup=warmup, total=1000, kind=kind, lr_min=1e-6)
        np.testing.assert_allclose(schedule(k), wanted, rtol=1e-5, atol=1e-12)


def test_the_published_numbers_of_diffusion_pipe(read):
    warm = ("lr=2e-5", "warmup_steps=100", "lr_scheduler=linear")
    schedule = make_schedule(read(*warm), total_steps=1000)
    np.testing.assert_allclose(schedule(0), 2e-7, rtol=1e-5)
    np.testing.assert_allclose(schedule(78), 1.5644e-5, rtol=1e-6)  # its issue 179's log
    np.testing.assert_allclose(schedule(100), 2e-5, rtol=1e-6)
    assert schedule(1000) == 0  # where its schedule still has 2e-6: it ends with the warm-up late
    longer = make_schedule(read(*warm), total_steps=1100)
    np.testing.assert_allclose(longer(500), 1.2e-5, rtol=1e-5)
    np.testing.assert_allclose(longer(1000), 2e-6, rtol=1e-4)


def test_a_forced_rate_takes_the_place_of_schedule_and_warm_up(read):
    config = read("force_constant_lr=3e-4", "warmup_steps=10", "lr_scheduler=cosine")
    schedule = make_schedule(config, total_steps=20)
    assert {float(schedule(k)) for k in range(25)} == {3e-4}


def test_the_floor_of_the_cosine_never_exceeds_the_rate(read):
    schedule = make_schedule(read("lr=1e-7", "lr_scheduler=cosine"), total_steps=10)
    np.testing.assert_allclose([schedule(k) for k in range(12)], 1e-7, rtol=1e-5)
    schedule = make_schedule(read("lr=1e-3", "lr_scheduler=cosine", "lr_min=0"), total_steps=10)
    assert schedule(10) == 0


# --- names and options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", kinds.AdamW),
        ("adamw_optimi", kinds.AdamW),
        ("AdamW8bitKahan", kinds.AdamW),
        ("adamw8bit", kinds.AdamW),
        ("StableAdamW", kinds.StableAdamW),
        ("Prodigy", kinds.Prodigy),
        ("ScheduleFreeAdamW", kinds.ScheduleFreeAdamW),
        ("schedule_free_adamw", kinds.ScheduleFreeAdamW),
        *((name, None) for name in kinds.NAMES),
    ],
)
def test_names_of_either_world_are_known(name, kind, read):
    options = read(f"optimizer.type={name}").optimizer
    assert kind is None or type(options) is kind
    assert options.type == name
    assert "float32 masters" in describe_optimizer(read(f"optimizer.type={name}")) or (
        "8bit" not in name and "optimi" not in name
    )


@pytest.mark.parametrize("name", ["automagic", "GenericOptim", "offload", "Sophia", "AdamX"])
def test_other_names_are_refused_with_what_to_use(name, read):
    with pytest.raises(BadInput, match=rf"c\.toml: \[optimizer\] type = '{name}' .*known: adamw, "):
        read(f"optimizer.type={name}")


def test_options_belong_to_their_optimizer(read):
    prodigy = read("optimizer.type=Prodigy", "optimizer.d_coef=2", "optimizer.betas=[0.9, 0.99]")
    assert prodigy.optimizer.d_coef == 2
    assert prodigy.learning_rate == 1.0
    assert read("optimizer.type=sgd", "optimizer.momentum=0.9").learning_rate == 2e-5
    with pytest.raises(BadInput, match=r"optimizer\.momentun, did you mean optimizer\.momentum\?"):
        read("optimizer.type=sgd", "optimizer.momentun=0.9")
    with pytest.raises(BadInput, match=r"optimizer\.d_coef \(Lion takes lr, .*betas"):
        read("optimizer.type=lion", "optimizer.d_coef=2")
    with pytest.raises(BadInput, match=r"optimizer\.betas\.1: "):
        read("optimizer.type=prodigy", "optimizer.betas=[0.9, 1.0]")
    with pytest.raises(BadInput, match="averages instead of lowering"):
        read("optimizer.type=schedule_free_adamw", "lr_scheduler='linear'")


def test_the_second_beta_follows_from_its_half_life_in_clips():
    options = kinds.AdamW(betas=[0.8, 0.5], beta2_half_life=100.0)
    beta1, beta2 = options.beta_pair(8)
    assert beta1 == 0.8
    assert beta2 ** (100 / 8) == pytest.approx(0.5)
    params, gradients = {"w": draw(3, 2)}, [{"w": draw(3, 2, seed=s)} for s in (1, 2)]
    (_, ours), _ = run(options, params, gradients, global_batch=8)
    same = kinds.AdamW(betas=[0.8, 0.5 ** (8 / 100)])
    (_, theirs), _ = run(same, params, gradients, global_batch=1)
    np.testing.assert_array_equal(ours["w"], theirs["w"])


# --- the optimizers -------------------------------------------------------------------------------

PARAMS = {
    "blocks.ffn.0.weight": draw(2, 4, 3),
    "blocks.ffn.0.bias": draw(2, 4, seed=1),
    "blocks.modulation": draw(2, 1, 6, 3, seed=2),
    "head.head.weight": draw(4, 3, seed=3),
    "head.head.bias": draw(4, seed=4),
}
GRADIENTS = [
    {name: draw(*p.shape, seed=10 * step + n) for n, (name, p) in enumerate(PARAMS.items())}
    for step in range(1, STEPS + 1)
]
DECAY = {name: not name.endswith("bias") for name in PARAMS}
WARM = optax.linear_schedule(0.02, 0.1, 4)


def reference(name: str, step, *, wd: float) -> list[np.ndarray]:
    """Runs a NumPy optimizer on one parameter: step(p, g, k, lr, memory, wd) -> p."""
    p, memory, history = PARAMS[name].copy(), {}, []
    for k, gradients in enumerate(GRADIENTS):
        lr = min(0.02 + 0.02 * k, 0.1)
        p = step(p, gradients[name], k, lr, memory, wd if DECAY[name] else 0.0)
        history.append(p)
    return history


def adamw_step(p, g, k, lr, memory, wd, *, b1=0.9, b2=0.99, eps=1e-8):
    m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
    v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
    m, v = m / (1 - b1 ** (k + 1)), v / (1 - b2 ** (k + 1))
    return p - lr * (m / (np.sqrt(v) + eps) + wd * p)


def stable_step(p, g, k, lr, memory, wd, *, b1=0.9, b2=0.99, eps=1e-8):
    layers = memory.setdefault("layers", [{} for _ in p])

    def one(p, g, memory):
        after = adamw_step(p, g, k, 1.0, memory, 0.0, b1=b1, b2=b2, eps=eps)
        v = memory["v"] / (1 - b2 ** (k + 1))
        rms = np.sqrt(np.mean(g * g / np.maximum(v, eps**2)))
        return lr * ((p - after) / max(1.0, rms) + wd * p)

    return p - np.stack([one(*parts) for parts in zip(p, g, layers, strict=True)])


def lion_step(p, g, k, lr, memory, wd, *, b1=0.9, b2=0.99):
    del k
    m = memory.get("m", 0.0)
    memory["m"] = b2 * m + (1 - b2) * g
    return p - lr * (np.sign(b1 * m + (1 - b1) * g) + wd * p)


def adopt_step(p, g, k, lr, memory, wd, *, b1=0.9, b2=0.9999, eps=1e-6):
    if k == 0:
        memory["v"], memory["m"] = g * g, 0.0
        return p - lr * wd * p
    scaled = np.clip(g / np.maximum(np.sqrt(memory["v"]), eps), -(k**0.25), k**0.25)
    memory["m"] = b1 * memory["m"] + (1 - b1) * scaled
    memory["v"] = b2 * memory["v"] + (1 - b2) * g * g
    return p - lr * (memory["m"] + wd * p)


def sgd_step(p, g, k, lr, memory, wd):
    g = g + wd * p
    memory["m"] = g if k == 0 else 0.9 * memory["m"] + g
    return p - lr * memory["m"]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (kinds.AdamW(weight_decay=0.3), adamw_step),
        (kinds.Lion(weight_decay=0.3), lion_step),
        (kinds.Adopt(weight_decay=0.3), adopt_step),
        (kinds.SGD(weight_decay=0.3, momentum=0.9), sgd_step),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_elementwise_optimizers_follow_their_papers(options, step):
    history, _ = run(options, PARAMS, GRADIENTS, lr=WARM)
    for name in PARAMS:
        for ours, wanted in zip(history, reference(name, step, wd=0.3), strict=True):
            np.testing.assert_allclose(ours[name], wanted, rtol=2e-5, atol=2e-6, err_msg=name)


def test_stable_adamw_limits_the_update_of_each_layer_alone():
    loud = [dict(g) for g in GRADIENTS]
    for gradients in loud[2:]:  # more than the average square has seen, in one layer only
        gradients["blocks.ffn.0.weight"] = gradients["blocks.ffn.0.weight"] * [[[9.0]], [[1.0]]]
    name = "blocks.ffn.0.weight"
    history, _ = run(kinds.StableAdamW(weight_decay=0.3), PARAMS, loud, lr=WARM)
    plain, _ = run(kinds.AdamW(weight_decay=0.3), PARAMS, loud, lr=WARM)
    also, _ = run(kinds.AdamW(weight_decay=0.3, stabilize=True), PARAMS, loud, lr=WARM)
    p, memory = PARAMS[name].copy(), {}
    for k, gradients in enumerate(loud):
        p = stable_step(p, gradients[name], k, min(0.02 + 0.02 * k, 0.1), memory, 0.3)
        np.testing.assert_allclose(history[k][name], p, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(history[-1][name], also[-1][name])
    assert np.abs(history[-1][name] - plain[-1][name])[0].max() > 0.01
    whole = stable_step(
        draw(1, 4, 3), loud[0]["head.head.weight"][None], 0, 0.02, {}, 0.0
    )  # outside of the blocks an array is one matrix
    start = draw(1, 4, 3)[0]
    after, _ = run(
        kinds.StableAdamW(weight_decay=0.0),
        {"head.w": start},
        [{"head.w": loud[0]["head.head.weight"]}],
        lr=0.02,
    )
    np.testing.assert_allclose(after[0]["head.w"], whole[0], rtol=2e-5, atol=2e-6)


def prodigy_reference(*, safeguard: bool, correct: bool, growth: float):
    d0, wd, d_coef = 1e-3, 0.3, 20.0
    b1, b2 = 0.9, 0.999
    b3, eps, d, numerator = b2**0.5, 1e-8, d0, 0.0
    p = {n: x.copy() for n, x in PARAMS.items()}
    m, v, s = ({n: 0.0 * x for n, x in PARAMS.items()} for _ in range(3))
    history, ds = [], []
    for k, g in enumerate(GRADIENTS):
        lr = min(0.02 + 0.02 * k, 0.1) * 10
        if correct:
            lr *= np.sqrt(1 - b2 ** (k + 1)) / (1 - b1 ** (k + 1))
        dlr = d * lr
        numerator = b3 * numerator + d / d0 * dlr * sum(
            np.sum(g[n] * (PARAMS[n] - p[n])) for n in p
        )
        for n in p:
            s[n] = b3 * s[n] + d / d0 * (d if safeguard else dlr) * g[n]
            m[n] = b1 * m[n] + (1 - b1) * d * g[n]
            v[n] = b2 * v[n] + (1 - b2) * (d * g[n]) ** 2
        estimate = d_coef * numerator / sum(np.abs(x).sum() for x in s.values())
        d = min(max(d, estimate), growth * d)
        for n in p:
            decay = wd if DECAY[n] else 0.0
            p[n] = p[n] - dlr * (m[n] / (np.sqrt(v[n]) + d * eps) + decay * p[n])
        history.append({n: x.copy() for n, x in p.items()})
        ds.append(d)
    return history, ds


@pytest.mark.parametrize(
    ("safeguard", "correct", "growth"),
    [(False, False, None), (True, True, None), (False, True, 1.1)],
)
def test_prodigy_follows_its_paper(safeguard, correct, growth):
    steady = [GRADIENTS[0]] * STEPS  # so that d grows
    options = kinds.Prodigy(
        d0=1e-3, d_coef=20.0, weight_decay=0.3, safeguard_warmup=safeguard, bias_correction=correct,
        growth_rate=growth,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "GRADIENTS", steady)
        wanted, ds = prodigy_reference(
            safeguard=safeguard, correct=correct, growth=growth or np.inf
        )
    history, state = run(options, PARAMS, steady, lr=lambda k: 10 * WARM(k))
    for ours, theirs in zip(history, wanted, strict=True):
        for name in PARAMS:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert ds[-1] > 1.05 * 1e-3
    np.testing.assert_allclose(optimizer_metrics(state)["prodigy_d"], ds[-1], rtol=1e-4)
    assert set(optimizer_metrics(state)) == {"prodigy_d"}


def test_prodigy_survives_a_step_without_gradient():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    history, state = run(kinds.Prodigy(), PARAMS, [zeros, GRADIENTS[0]], lr=1.0)
    assert np.isfinite(optimizer_metrics(state)["prodigy_d"])
    assert all(np.isfinite(leaf).all() for leaf in history[-1].values())


def test_other_optimizers_have_nothing_more_to_report():
    _, state = run(kinds.AdamW(), PARAMS, GRADIENTS[:1])
    assert optimizer_metrics(state) == {}


def test_schedule_free_trains_between_its_two_sequences():
    b1, b2, eps, wd = 0.9, 0.999, 1e-8, 0.3
    options = kinds.ScheduleFreeAdamW(weight_decay=wd)
    history, _ = run(options, PARAMS, GRADIENTS, lr=WARM)
    for name in PARAMS:
        x = z = y = PARAMS[name].copy()
        v, total, largest = 0.0, 0.0, 0.0
        for k, gradients in enumerate(GRADIENTS):
            g, lr = gradients[name], min(0.02 + 0.02 * k, 0.1)
            v = b2 * v + (1 - b2) * g * g
            adam = g / (np.sqrt(v / (1 - b2 ** (k + 1))) + eps)
            z = z - lr * (adam + (wd if DECAY[name] else 0.0) * y)
            largest = max(largest, lr)
            total += largest**2
            x = x + (z - x) * largest**2 / total
            y = (1 - b1) * z + b1 * x
            np.testing.assert_allclose(history[k][name], y, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_the_matrix_of_each_layer():
    params = {
        "blocks.q.lora_A": draw(2, 4, 16),
        "blocks.q.lora_B": draw(2, 24, 4),
        "blocks.norm.weight": draw(2, 16),
        "blocks.modulation": draw(2, 1, 6, 16),
        "text.weight": draw(16, 16),
    }
    gradients = [{n: draw(*p.shape, seed=s) for n, p in params.items()} for s in (1, 2, 3)]
    history, _ = run(kinds.Muon(adam_lr=1e-3, lr=0.1), params, gradients, lr=0.1)
    for name in ("blocks.q.lora_A", "blocks.q.lora_B"):
        for layer in (1,):
            change = (history[1][name] - history[0][name])[layer] / 0.1
            values = np.linalg.svd(change, compute_uv=False)
            scale = 0.2 * math.sqrt(max(change.shape))
            np.testing.assert_allclose(values / scale, 1, atol=0.35)
            alone, _ = run(
                kinds.Muon(), {"blocks.w": params[name][layer][None]},
                [{"blocks.w": g[name][layer][None]} for g in gradients], lr=0.1,
            )  # fmt: skip
            np.testing.assert_allclose(
                history[-1][name][layer], alone[-1]["blocks.w"][0], atol=1e-6
            )
    adam, _ = run(kinds.AdamW(weight_decay=0.0), params, gradients, lr=1e-3)
    for name in ("blocks.norm.weight", "blocks.modulation", "text.weight"):
        np.testing.assert_allclose(history[-1][name], adam[-1][name], rtol=1e-5, atol=1e-7)


def newton_schulz(x: np.ndarray, steps: int = 5) -> np.ndarray:
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's polynomial
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if flip else x


def test_muon_follows_its_description():
    params = {"blocks.w": draw(1, 6, 4)}
    gradients = [{"blocks.w": draw(1, 6, 4, seed=s)} for s in (1, 2, 3)]
    history, _ = run(kinds.Muon(nesterov=False, weight_decay=0.3), params, gradients)
    p, m = params["blocks.w"][0].copy(), 0.0
    for k, gradient in enumerate(gradients):
        m = 0.95 * m + 0.05 * gradient["blocks.w"][0]
        p = p - 0.1 * (0.2 * math.sqrt(6) * newton_schulz(m) + 0.3 * p)
        np.testing.assert_allclose(history[k]["blocks.w"][0], p, rtol=1e-4, atol=1e-5)


def test_adafactor_factors_each_layer_and_not_the_stack():
    # As many layers as rows: of a stack the two largest axes would be others than of a matrix.
    stacked = {"blocks.w": draw(5, 4, 3)}
    gradients = [{"blocks.w": draw(5, 4, 3, seed=s)} for s in (1, 2, 3)]
    history, _ = run(kinds.Adafactor(weight_decay=0.1), stacked, gradients)
    for layer in range(5):
        alone, _ = run(
            kinds.Adafactor(weight_decay=0.1), {"w": stacked["blocks.w"][layer]},
            [{"w": g["blocks.w"][layer]} for g in gradients],
        )  # fmt: skip
        np.testing.assert_allclose(history[-1]["blocks.w"][layer], alone[-1]["w"], rtol=1e-5)


@pytest.mark.parametrize("name", kinds.NAMES)
def test_vectors_of_a_layer_do_not_decay_and_matrices_do(name):
    options = kinds.find_optimizer(name).options
    settings = {"d0": 0.1} if name == "prodigy" else {}
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    (after,), _ = run(options(weight_decay=0.5, **settings), PARAMS, [zeros])
    moved = {n: bool(np.abs(after[n] - PARAMS[n]).max() > 1e-4) for n in PARAMS}
    assert moved == DECAY


@pytest.mark.parametrize("name", kinds.NAMES)
def test_every_optimizer_lowers_a_loss_and_takes_its_state_back(name):
    """On a quadratic; and as one run or in two parts, as checkpoints cut it, to the same bit."""
    target = {n: jnp.asarray(p + 1, jnp.float32) for n, p in PARAMS.items()}
    options = kinds.find_optimizer(name).options()
    optimizer = make_optimizer(
        options, schedule=optax.constant_schedule(0.05), gradient_clipping=1.0
    )

    def loss(params):
        return sum(jnp.sum(jnp.square(p - target[n])) for n, p in params.items())

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {n: jnp.asarray(p, jnp.float32) for n, p in PARAMS.items()}
    state, start = optimizer.init(params), float(loss(params))
    for k in range(20):
        if k == 10:  # through host memory, leaf by leaf
            leaves, structure = jax.tree.flatten((params, state))
            params, state = jax.tree.unflatten(
                structure, [jnp.array(np.asarray(x)) for x in leaves]
            )
        params, state = step(params, state)
    assert float(loss(params)) < start
    assert step._cache_size() == 1


# --- clipping, ratios, PyTorch --------------------------------------------------------------------


def test_clipping_limits_the_norm_of_all_gradients():
    for size, wanted in ((0.1, 0.1), (100.0, 0.5)):
        gradients = [{"a": np.full(2, size), "b": np.full(2, size)}]
        start = {"a": np.zeros(2), "b": np.zeros(2)}
        (after,), _ = run(kinds.SGD(), start, gradients, lr=1.0, gradient_clipping=1.0)
        np.testing.assert_allclose(after["a"], -wanted, rtol=1e-5)


def test_a_ratio_multiplies_the_rate_of_its_parameters_alone():
    plain, _ = run(kinds.AdamW(), PARAMS, GRADIENTS, lr=0.1)
    slow, _ = run(kinds.AdamW(), PARAMS, GRADIENTS, lr=0.05)
    both, _ = run(kinds.AdamW(), PARAMS, GRADIENTS, lr_ratios={"blocks.ffn.0": 0.5})
    for name in PARAMS:
        wanted = slow if name.startswith("blocks.ffn.0.") else plain
        np.testing.assert_allclose(both[-1][name], wanted[-1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Muon"])
def test_pytorch_takes_the_same_steps(name):
    torch = pytest.importorskip("torch")
    params = {"blocks.w": draw(1, 4, 3)}
    gradients = [{"blocks.w": draw(1, 4, 3, seed=s)} for s in range(1, 7)]
    options, settings, tolerance = {
        "AdamW": (kinds.AdamW(weight_decay=0.3), {"betas": (0.9, 0.99), "weight_decay": 0.3}, 1e-5),
        "SGD": (
            kinds.SGD(weight_decay=0.3, momentum=0.9, nesterov=True),
            {"weight_decay": 0.3, "momentum": 0.9, "nesterov": True},
            1e-5,
        ),
        "Adafactor": (kinds.Adafactor(weight_decay=0.3), {"weight_decay": 0.3}, 1e-5),
        "Muon": (  # whose Newton-Schulz steps are in bfloat16
            kinds.Muon(weight_decay=0.3, nesterov=False),
            {"weight_decay": 0.3, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
            0.03,
        ),
    }[name]
    history, _ = run(options, params, gradients, lr=0.1)
    theirs = torch.nn.Parameter(torch.tensor(params["blocks.w"][0], dtype=torch.float32))
    optimizer = getattr(torch.optim, name)([theirs], lr=0.1, **settings)
    for ours, gradient in zip(history, gradients, strict=True):
        theirs.grad = torch.tensor(gradient["blocks.w"][0], dtype=torch.float32)
        optimizer.step()
        np.testing.assert_allclose(
            ours["blocks.w"][0], theirs.detach().numpy(), rtol=tolerance, atol=tolerance
        )
