"""Float8 linears against NumPy in float64, with error bars that follow from the formats.

U is half a step of bfloat16 (8 bits of mantissa), relative to the number: what a rounding costs.
Sums in float32 are shorter than 2^8 here and cost less than SUM of the terms' sizes.
"""

import logging
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from wan22_jax.model import fp8, fused, linear, transformer
from wan22_jax.model.fp8 import BACKWARD, FORWARD, power_of_two_scale, quantize_weight
from wan22_jax.model.linear import LinearWeights
from wan22_jax.model.lora import LowRank, round_low_rank
from wan22_jax.model.transformer import TransformerConfig, WanTransformer

U, SUM = 2.0**-8, 2.0**-16
SECOND_ORDER = 1.02  # errors of errors, all under 2 % of the error
N, IN, OUT, R = 40, 64, 48, 4  # rows are no multiple of 16, which float8 matmuls are padded to
LORA_SCALE = 1.5  # alpha / rank
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


class Bounded(NamedTuple):
    """Numbers, and how far a correct result may be from each."""

    value: np.ndarray
    error: np.ndarray

    def __matmul__(self, other: "Bounded") -> "Bounded":
        """A product summed in float32."""
        sizes = abs(self.value) @ abs(other.value)
        error = self.error @ abs(other.value) + abs(self.value) @ other.error
        return Bounded(self.value @ other.value, error + SUM * sizes)

    def __add__(self, other: "Bounded") -> "Bounded":
        return Bounded(self.value + other.value, self.error + other.error)

    def times(self, factor) -> "Bounded":
        return Bounded(self.value * factor, self.error * factor)

    def rounded(self) -> "Bounded":
        """To bfloat16."""
        return Bounded(self.value, self.error + U * abs(self.value))

    @property
    def T(self) -> "Bounded":
        return Bounded(self.value.T, self.error.T)


def exactly(array) -> Bounded:
    value = np.asarray(array).astype(np.float64)
    return Bounded(value, np.zeros_like(value))


def scale_rows(x: np.ndarray, dtype) -> np.ndarray:
    """The least power of two for each row that brings it into the range of the dtype."""
    amax = abs(x).max(axis=-1, keepdims=True)
    mantissa, exponent = np.frexp(amax / float(ml_dtypes.finfo(dtype).max))
    return np.where(
        amax == 0, 1.0, np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    )


def to_float8(x: np.ndarray, dtype) -> np.ndarray:
    """Rounds rows to multiples of their scale that the dtype has."""
    scale = scale_rows(x, dtype)
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def forward(x8: Bounded, x: Bounded, w: dict, group: int, *, bias: bool, adapter: bool) -> Bounded:
    out = (x8 @ exactly(w["weight"][group]).T).rounded()
    if bias:
        out += exactly(w["bias"][group])
    if adapter:
        out += low_rank(x, w, group) @ exactly(w["B"][group]).rounded().T
    return out.rounded()


def low_rank(x: Bounded, w: dict, group: int) -> Bounded:
    return (x @ exactly(w["A"][group]).times(LORA_SCALE).rounded().T).rounded()


def backward(gradients: list, x: Bounded, w: dict, *, adapter: bool) -> dict[str, Bounded]:
    """Gradients by the input and, joined over groups, by A and B."""
    scales = [
        np.full(gradient.shape[1], scale)
        for gradient, scale in zip(gradients, w["scale"], strict=True)
    ]
    joined = np.concatenate(gradients, axis=1)
    # What is quantised is the gradient times the weight's scale.
    joined8 = to_float8(joined * np.concatenate(scales), E5M2) / np.concatenate(scales)
    found = {"x": (exactly(joined8) @ exactly(np.concatenate(w["weight"]))).rounded()}
    if adapter:
        dlow = [
            (exactly(gradient) @ exactly(w["B"][group]).times(LORA_SCALE).rounded()).rounded()
            for group, gradient in enumerate(gradients)
        ]
        for group, each in enumerate(dlow):
            found["x"] += each @ exactly(w["A"][group]).rounded()
        da = [each.T @ x for each in dlow]
        db = [exactly(g).T @ low_rank(x, w, group) for group, g in enumerate(gradients)]
        for name, parts in (("A", da), ("B", db)):
            found[name] = Bounded(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    return found | {"x": found["x"].rounded()}


def assert_within(got, expected: Bounded) -> None:
    error = abs(np.asarray(got).astype(np.float64) - expected.value)
    assert (error <= SECOND_ORDER * expected.error).all(), (error / expected.error).max()
    # The bars are not so wide that anything passes.
    assert np.linalg.norm(expected.error) < 0.1 * np.linalg.norm(expected.value)


def draw(rng: np.random.Generator, *shape: int, std: float = 1.0):
    """Bfloat16 rows whose sizes differ."""
    spread = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return jnp.asarray(std * spread * rng.normal(size=shape), jnp.bfloat16)


def make_case(groups: int, *, bias: bool, adapter: bool) -> tuple:
    """An input, weights, A and B of an adapter, and all of them for NumPy.

    Each group has another scale; without an adapter A and B are None.
    """
    rng = np.random.default_rng(groups)
    wide = [
        2.0**-group * rng.normal(size=(OUT, IN)).astype(np.float32) / 8 for group in range(groups)
    ]
    quantised = [quantize_weight(jnp.asarray(each)) for each in wide]
    numbers = {
        "scale": [float(scale) for _, scale in quantised],
        "weight": [
            np.asarray(weight).astype(np.float64) * float(scale) for weight, scale in quantised
        ],
        "bias": [np.asarray(draw(rng, 1, OUT)[0]) for _ in range(groups)],
        "A": [rng.normal(size=(R, IN)).astype(np.float32) / 8 for _ in range(groups)],
        "B": [rng.normal(size=(OUT, R)).astype(np.float32) / 2 for _ in range(groups)],
    }
    weights = LinearWeights(
        weight_OI=jnp.concatenate([weight for weight, _ in quantised]),
        scale_G=jnp.stack([scale for _, scale in quantised]),
        bias_O=jnp.concatenate(numbers["bias"]) if bias else None,
    )
    assert groups == 1 or len(set(numbers["scale"])) == groups
    lora = tuple(jnp.concatenate(numbers[name]) if adapter else None for name in "AB")
    return draw(rng, N, IN), weights, lora, numbers


def pull(function, x: jax.Array, weights: LinearWeights, lora: tuple, gradients: tuple) -> tuple:
    """Outputs, and gradients by x and by the adapter (its A and B, or None)."""

    def run(x: jax.Array, lora: tuple) -> tuple[jax.Array, ...]:
        if lora[0] is None:
            return function(x, weights)
        parts_b = tuple(jnp.split(lora[1], len(lora[1]) // OUT))
        trained = LowRank(LORA_SCALE * lora[0], parts_b)
        rounded = round_low_rank(trained, x.dtype)
        return function(x, weights._replace(lora=rounded, trained=trained))

    outs, pull_back = jax.vjp(run, x, lora)
    return outs, *pull_back(gradients)


def quantised_linear(x: jax.Array, weights: LinearWeights, *, groups: int) -> tuple:
    return linear.linear(fused.activate(x, is_float8=True), weights, groups=groups)


def gelu_linear(x: jax.Array, weights: LinearWeights) -> tuple[jax.Array, ...]:
    return linear.linear(fused.Activation(*fused.gelu_twin(x, quantize=True)), weights)


cases = pytest.mark.parametrize(
    ("groups", "bias", "adapter"),
    [(1, True, True), (1, False, False), (1, True, False), (3, True, True), (2, False, True)],
)


@cases
def test_linear_and_its_gradients(groups, bias, adapter):
    x, weights, lora, numbers = make_case(groups, bias=bias, adapter=adapter)
    rng = np.random.default_rng(7)
    gradients = tuple(draw(rng, N, OUT, std=1e-4) for _ in range(groups))
    function = partial(quantised_linear, groups=groups)
    outs, dx, (da, db) = pull(function, x, weights, lora, gradients)
    x64 = np.asarray(x).astype(np.float64)
    x8 = exactly(to_float8(x64, E4M3))
    assert len(outs) == groups
    for group, out in enumerate(outs):
        assert out.dtype == x.dtype
        expected = forward(x8, exactly(x64), numbers, group, bias=bias, adapter=adapter)
        assert_within(out, expected)
    fixed = [np.asarray(gradient).astype(np.float64) for gradient in gradients]
    expected = backward(fixed, exactly(x64), numbers, adapter=adapter)
    assert_within(dx, expected["x"])
    if adapter:
        assert_within(da, expected["A"])
        assert_within(db, expected["B"])
        assert (da.dtype, db.dtype) == (jnp.float32, jnp.float32)
    else:
        assert da is db is None


@pytest.mark.parametrize("adapter", [True, False])
def test_gelu_linear_and_its_gradients(adapter):
    x, weights, lora, numbers = make_case(1, bias=True, adapter=adapter)
    gradient = draw(np.random.default_rng(7), N, OUT, std=1e-4)
    (out,), dx, (da, db) = pull(gelu_linear, x, weights, lora, (gradient,))
    x64 = np.asarray(x).astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3)
    # exp multiplies the relative error of what it is given, under 16 where it matters.
    near = [
        (x64 * (1 + np.tanh(inner)) / 2 * (1 + error)).astype(ml_dtypes.bfloat16).astype(np.float64)
        for error in (0, -(2.0**-18), 2.0**-18)
    ]
    y = Bounded(near[0], abs(near[2] - near[1]))
    near8 = [to_float8(each, E4M3) for each in near]
    y8 = Bounded(near8[0], abs(near8[2] - near8[1]))
    assert (y.error > 0).mean() < 0.02  # where it is not clear which way to round
    assert_within(out, forward(y8, y, numbers, 0, bias=True, adapter=adapter))
    expected = backward([np.asarray(gradient).astype(np.float64)], y, numbers, adapter=adapter)
    tanh = np.tanh(inner)
    slope = (1 + tanh) / 2 + x64 / 2 * (1 - tanh**2) * np.sqrt(2 / np.pi) * (
        1 + 3 * 0.044715 * x64**2
    )
    dy = expected["x"]
    error = dy.error * abs(slope) + 2.0**-18 * abs(dy.value)  # of the slope, a sum of float32
    assert_within(dx, Bounded(dy.value * slope, error).rounded())
    if adapter:
        assert_within(da, expected["A"])
        assert_within(db, expected["B"])


def test_a_feed_forward_is_linear_gelu_and_linear():
    x, up, up_lora, _ = make_case(1, bias=True, adapter=True)
    rng = np.random.default_rng(3)
    weight, scale = quantize_weight(jnp.asarray(rng.normal(size=(IN, OUT)) / 8, jnp.float32))
    down = LinearWeights(weight, scale[None], draw(rng, IN))
    down_lora = draw(rng, 4, OUT).astype(jnp.float32), draw(rng, IN, 4).astype(jnp.float32)
    gradient = draw(rng, N, IN, std=1e-4)

    def with_lora(weights: LinearWeights, lora: tuple) -> LinearWeights:
        trained = LowRank(lora[0], (lora[1],))
        return weights._replace(lora=round_low_rank(trained, x.dtype), trained=trained)

    def run(chained: bool, x, up_lora, down_lora):
        first, second = with_lora(up, up_lora), with_lora(down, down_lora)
        x = fused.activate(x, is_float8=True)
        if chained:
            return linear.linear_gelu_linear(x, first, second, name="hidden")
        return gelu_linear(linear.linear(x, first)[0], second)[0]

    outs = []
    for chained in (True, False):
        out, pull_back = jax.vjp(partial(run, chained), x, up_lora, down_lora)
        outs.append([out, *jax.tree.leaves(pull_back(gradient))])
    assert len(outs[0]) == 6
    for one, other in zip(*outs, strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_array_equal(one, other)


def test_float8_costs_what_its_format_says():
    """Against the product before any rounding: half a step of three bits for each number."""
    rng = np.random.default_rng(0)
    x, weight = draw(rng, N, IN), np.asarray(draw(rng, OUT, IN), np.float32)
    weight8, scale = quantize_weight(jnp.asarray(weight))
    weights = LinearWeights(weight8, scale[None], None)
    (out,) = quantised_linear(x, weights, groups=1)

    def bound(x: np.ndarray, scale) -> Bounded:
        """Normal numbers lose 2^-4 of themselves, others half of the least step, 2^-9."""
        return Bounded(x, np.maximum(2.0**-4 * abs(x), scale * 2.0**-10))

    x64 = np.asarray(x).astype(np.float64)
    rows, matrix = bound(x64, scale_rows(x64, E4M3)), bound(weight.astype(np.float64), float(scale))
    product = rows @ matrix.T
    # Errors of both factors meet: not small against either.
    error = product.error + rows.error @ matrix.error.T
    difference = abs(np.asarray(out).astype(np.float64) - product.value)
    assert (difference <= error + U * (abs(product.value) + error)).all()
    typical = np.linalg.norm(difference) / np.linalg.norm(product.value)
    assert 0.005 < typical < 2.0**-4  # and it is on


# Scales


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_a_scale_is_the_least_power_of_two_that_fits(dtype):
    largest = float(jnp.finfo(dtype).max)
    rng = np.random.default_rng(0)
    exponents = np.arange(-88, 110, dtype=np.float32)
    edges = np.float32(largest) * 2.0**exponents  # the largest number itself needs no more
    amax = np.concatenate(
        [
            edges,
            np.nextafter(edges, np.float32(0)),
            np.nextafter(edges, np.float32(np.inf)),
            rng.uniform(1, 2, 1000).astype(np.float32) * 2.0 ** rng.integers(-80, 127, 1000),
        ]
    ).astype(np.float32)
    scale = np.asarray(power_of_two_scale(jnp.asarray(amax), dtype), np.float64)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (amax / scale <= largest).all()
    assert (amax / scale > largest / 2).all()
    np.testing.assert_array_equal(scale[: len(edges)], 2.0**exponents)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_the_ends_of_float32_have_scales_too(dtype):
    ends = [
        0.0,
        1e-45,  # no normal number: counts as 0 on some devices
        2.0**-125,
        float(jnp.finfo(jnp.bfloat16).max),
        float(jnp.finfo(jnp.float32).max),
    ]
    scale = np.asarray(power_of_two_scale(jnp.asarray(ends, jnp.float32), dtype), np.float64)
    assert scale[0] == 1
    assert scale[1] in (1.0, 2.0**-100)
    assert scale[2] == 2.0**-100  # its inverse is a number as well
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (np.asarray(ends) / scale <= float(jnp.finfo(dtype).max)).all()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_rows_are_quantised_as_numpy_does_and_never_saturate(dtype):
    largest, bits = float(jnp.finfo(dtype).max), jnp.finfo(dtype).nmant
    rng = np.random.default_rng(0)
    x = np.asarray(draw(rng, 64, IN), np.float32)
    x[:8] *= 2.0 ** np.arange(-80, 80, 20)[:, None]
    x[8] = 0
    x[9, 1:] = 0
    x[10] = np.float32(jnp.finfo(jnp.bfloat16).max)
    x[11, :2] = largest, -largest
    x[12] = 2.0**-125
    rows = jnp.asarray(x, jnp.bfloat16)
    values, scale = fused.quantize_rows_twin([rows], None, dtype=dtype)
    assert values.dtype == dtype
    x64 = np.asarray(rows).astype(np.float64)
    got = np.asarray(values).astype(np.float64) * np.asarray(scale, np.float64)[:, None]
    assert np.isfinite(got).all()
    normal = np.arange(len(x)) != 12  # whose scale has reached its least
    expected = to_float8(x64, E4M3 if dtype == FORWARD else E5M2)
    np.testing.assert_array_equal(got[normal], expected[normal])
    assert (got[12] == 0).all()
    # No number is off by more than half a step, as one that saturates would be.
    step = float(jnp.finfo(dtype).smallest_subnormal) * np.asarray(scale, np.float64)[:, None]
    assert (abs(got - x64) <= np.maximum(2.0 ** (-bits - 1) * abs(x64), step / 2)).all()
    # And the largest of a row uses the range: at least half of it, but for its rounding.
    amax = abs(np.asarray(values).astype(np.float64)).max(axis=1)
    assert (amax[normal & (x != 0).any(axis=1)] > largest / 2.3).all()


def test_a_stack_is_quantised_matrix_by_matrix():
    rng = np.random.default_rng(0)
    sizes = np.array([1e-3, 1.0, 500.0, 0.0], np.float32)[:, None, None]
    stack = jnp.asarray(sizes * rng.normal(size=(4, OUT, IN)).astype(np.float32))
    values, scales = quantize_weight(stack)
    assert (values.dtype, values.shape) == (FORWARD, stack.shape)
    assert (scales.dtype, scales.shape) == (jnp.float32, (4,))
    assert scales[3] == 1
    assert len(set(np.asarray(scales).tolist())) == 4
    for index, matrix in enumerate(stack):
        value, scale = quantize_weight(matrix)
        np.testing.assert_array_equal(values[index], value)
        assert scale == scales[index]
        flat = np.asarray(matrix).astype(np.float64).reshape(1, -1)
        expected = to_float8(flat, E4M3).reshape(matrix.shape)
        np.testing.assert_array_equal(np.asarray(value).astype(np.float64) * float(scale), expected)


# What the GPU does


def test_padding_rows_leak_into_nothing(monkeypatch):
    """GPU kernels pad float8 rows to a multiple of 16; whatever stands there, nothing changes."""
    x, weights, lora, _ = make_case(3, bias=True, adapter=True)
    gradients = tuple(draw(np.random.default_rng(7), N, OUT) for _ in range(3))
    function = partial(quantised_linear, groups=3)
    expected = pull(function, x, weights, lora, gradients)
    seen = []

    def pad(parts, scale_G, *, dtype):
        values, scale = fused.quantize_rows_twin(parts, scale_G, dtype=dtype)
        seen.append(dtype)
        junk = jnp.full((8, values.shape[1]), jnp.finfo(dtype).max)
        return jnp.concatenate([values, junk]), jnp.concatenate([scale, jnp.full((8,), jnp.nan)])

    monkeypatch.setattr(linear, "quantize_rows", pad)
    monkeypatch.setattr(fused, "quantize_rows", pad)
    got = pull(function, x, weights, lora, gradients)
    assert seen == [FORWARD, BACKWARD]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("has_float8", [True, False])
def test_the_first_product_is_float8_where_there_is_one(has_float8, monkeypatch):
    monkeypatch.setattr(fp8, "has_float8_matmul", lambda _: has_float8)
    x, weights, lora, _ = make_case(1, bias=True, adapter=True)
    gradient = (jnp.ones((N, OUT), jnp.bfloat16),)
    for function in (partial(quantised_linear, groups=1), gelu_linear):
        program = jax.make_jaxpr(partial(pull, function))(x, weights, lora, gradient)
        products = [
            tuple(variable.aval.dtype for variable in equation.invars)
            for equation in program.eqns
            if equation.primitive.name == "dot_general"
            and {IN, OUT} <= set(equation.invars[1].aval.shape)
        ]
        pairs = [(FORWARD, FORWARD), (BACKWARD, FORWARD)]
        assert products == (pairs if has_float8 else [(jnp.bfloat16,) * 2] * 2)


def test_bfloat16_stands_in_for_float8_without_loss():
    """One rounding of an exact product, whatever the device multiplies."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 * rng.normal(size=(N, IN)), FORWARD)
    weight = jnp.asarray(100 * rng.normal(size=(OUT, IN)), FORWARD)
    for left in (x, x.astype(jnp.float32).astype(BACKWARD)):
        got = fp8.float8_matmul(left, weight)
        assert got.dtype == jnp.bfloat16
        assert_within(got, (exactly(left) @ exactly(weight).T).rounded())


def test_a_device_without_float8_matmuls_is_named_once(caplog):
    fp8.has_float8_matmul.cache_clear()
    x, weights, *_ = make_case(1, bias=False, adapter=False)
    with caplog.at_level(logging.INFO, logger=fp8.__name__):
        for _ in range(2):
            quantised_linear(x, weights, groups=1)
    (message,) = caplog.messages
    assert message == (
        f"float8: {jax.local_devices()[0].device_kind} has no float8 matmuls, "
        "bfloat16 ones are used"
    )


@pytest.mark.parametrize("adapted", [(), ("blocks.ffn.2", "blocks.self_attn.q")])
def test_sampling_leaves_out_rows_that_only_a_gradient_reads(adapted, monkeypatch):
    config = TransformerConfig(
        dim=16, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4, freq_dim=8
    )
    model = WanTransformer(config, rngs=nnx.Rngs(0))
    model.to_float8()
    for name, layer in model.lora_targets():
        if name in adapted:
            layer.add_lora(jax.random.key(1), rank=2, alpha=2.0)
            layer.lora_B[...] = jax.random.normal(jax.random.key(2), layer.lora_B.shape)
    kept = []

    def watch(name, module):
        real = getattr(module, name)

        def watched(*args, **options):
            kept.append(options["rows"])
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch("residual_norm", transformer)
    watch("gelu", linear)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, 2, 4, 4, 48)), np.full((1, 2), 0.5), rng.normal(size=(1, 4, 8))
    inputs = [np.asarray(each, np.float32) for each in inputs]
    wanted = model(*inputs)
    assert all(kept)
    kept.clear()
    np.testing.assert_array_equal(model(*inputs, differentiable=False), wanted)
    # What reads them: q, k and v; the text's queries; the first linear; the second one.
    readers = ("blocks.self_attn.q", "blocks.cross_attn.q", "blocks.ffn.0", "blocks.ffn.2")
    assert kept == [name in adapted for name in readers]  # of one block, which a loop runs
