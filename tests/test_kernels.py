"""Each GPU kernel against its plain JAX twin; in interpret mode where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model import fused, kernels, matmul
from wan22_jax.model.fp8 import BACKWARD, FORWARD, power_of_two_scale
from wan22_jax.model.rope import rope_tables

INTERPRET = jax.default_backend() != "gpu"
TOKENS, WIDTH = 2 * 3 * 15, 384  # no multiple of 16 or 64 rows, no power of two wide


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype=jnp.bfloat16) -> jax.Array:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


def assert_close(got, expected, *, bits: int = 8) -> None:
    """Equal up to rounding in the last place of a type with so many bits of mantissa."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(expected).all()
    error = np.abs(got - expected)
    assert (error <= 2.0 ** (1 - bits) * np.abs(expected) + 1e-6 * np.abs(expected).max()).all()
    assert (error > 0).mean() < 0.05, "rounds differently"


def assert_float8(got, expected, rows) -> None:
    """The same rows in float8: a value may round to the next where the rows differ by a bit."""
    (got8, got_scale), (expected8, expected_scale) = got, expected
    assert got8.dtype == expected8.dtype
    N = rows.shape[0]
    assert got8.shape[0] % kernels.ROWS == 0
    assert got8.shape[0] >= N
    np.testing.assert_array_equal(got_scale[:N], expected_scale)
    bits = 4 if got8.dtype == FORWARD else 3
    value = got8[:N].astype(jnp.float32) * got_scale[:N, None]
    expected = expected8.astype(jnp.float32) * expected_scale[:, None]
    assert_close(value, expected, bits=bits)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(("branch", "gate"), [(False, False), (True, False), (True, True)])
def test_residual_norm(branch, gate, quantize):
    x, y = draw(TOKENS, WIDTH), draw(TOKENS, WIDTH, seed=1) if branch else None
    gates = draw(6, WIDTH, seed=2, dtype=jnp.float32) if gate else None
    rows = 6 if gate or not branch else 1
    weight = 1 + draw(rows, WIDTH, seed=3, scale=0.2, dtype=jnp.float32)
    shift = draw(rows, WIDTH, seed=4, dtype=jnp.float32)
    static = (1e-6, jnp.dtype(jnp.bfloat16), quantize)
    options = {"eps": 1e-6, "dtype": jnp.bfloat16, "quantize": quantize, "interpret": INTERPRET}
    got = kernels.residual_norm(x, y, gates, weight, shift, **options)
    expected = fused.residual_norm_twin(static, x, y, gates, weight, shift)
    if branch:
        np.testing.assert_array_equal(got[0], expected[0])
        got = got[1:]
    assert_close(got[0], expected[1])
    assert len(got) == (3 if quantize else 1)
    if quantize:
        assert_float8(got[1:], expected[2:], x)


@pytest.mark.parametrize(("branch", "gate"), [(False, False), (True, False), (True, True)])
def test_residual_norm_backward(branch, gate):
    x = draw(TOKENS, WIDTH, dtype=jnp.float32)
    y = draw(TOKENS, WIDTH, seed=1, dtype=jnp.float32) if branch else None
    gates = draw(6, WIDTH, seed=2, dtype=jnp.float32) if gate else None
    weight = 1 + draw(6, WIDTH, seed=3, scale=0.2, dtype=jnp.float32)
    shift = draw(6, WIDTH, seed=4, dtype=jnp.float32)
    dx, dy = draw(TOKENS, WIDTH, seed=5), draw(TOKENS, WIDTH, seed=6)

    def twin(x, y):
        return fused.residual_norm_twin((1e-6, jnp.float32, False), x, y, gates, weight, shift)

    (total, _), pull = jax.vjp(twin, x, y)
    expected = [g for g in pull((dx.astype(jnp.float32), dy.astype(jnp.float32))) if g is not None]
    got = kernels.residual_norm_backward(
        *(total, dy, dx, gates, weight),
        eps=1e-6,
        dtype=jnp.bfloat16 if branch else None,
        interpret=INTERPRET,
    )
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert_close(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16))


@pytest.mark.parametrize("head_dim", [128, 96, None])  # a head may straddle a kernel's vectors
def test_norm_rope_and_its_gradient(head_dim):
    rope = rope_tables((3, 3, 5), head_dim) if head_dim else None  # two examples share the table
    x, weight = draw(TOKENS, WIDTH), 1 + draw(WIDTH, seed=1, scale=0.2)
    got = kernels.norm_rope(x, weight, rope, eps=1e-6, interpret=INTERPRET)
    assert_close(got, fused.norm_rope_twin(1e-6, x, weight, rope))
    dy = draw(TOKENS, WIDTH, seed=2)
    got = kernels.norm_rope_backward(x, dy, weight, rope, eps=1e-6, interpret=INTERPRET)
    x32, weight32, dy32 = (a.astype(jnp.float32) for a in (x, weight, dy))
    (expected,) = jax.vjp(lambda x: fused.norm_rope_twin(1e-6, x, weight32, rope), x32)[1](dy32)
    assert_close(got, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("scaled", [True, False])
def test_quantize_rows(scaled, dtype):
    parts = [draw(TOKENS, WIDTH, seed=seed, scale=10.0**-seed) for seed in range(3)]
    scale = jnp.asarray([1.0, 16.0, 0.25]) if scaled else None
    got = kernels.quantize_rows(parts, scale, dtype=dtype, interpret=INTERPRET)
    expected = fused.quantize_rows_twin(parts, scale, dtype=dtype)
    assert_float8(got, expected, parts[0])


@pytest.mark.parametrize("quantize", [True, False])
def test_gelu(quantize):
    x = draw(TOKENS, 7 * 128, scale=3.0).at[0, :4].set(jnp.asarray([-100.0, 100.0, 0.0, -30.0]))
    got = kernels.gelu_quantize(x, quantize=quantize, interpret=INTERPRET)
    expected = fused.gelu_twin(x, quantize=quantize)
    assert len(got) == len(expected)
    assert_close(got[0], expected[0])
    if quantize:
        assert_float8(got[1:], expected[1:], x)


@pytest.mark.parametrize("scaled", [True, False])
def test_gelu_backward(scaled):
    x = draw(TOKENS, 7 * 128, scale=3.0).at[0, :4].set(jnp.asarray([-100.0, 100.0, 0.0, -30.0]))
    dy, scale = draw(*x.shape, seed=1), jnp.asarray([0.125]) if scaled else None
    got = kernels.gelu_backward(x, dy, scale, interpret=INTERPRET)
    expected = fused.gelu_backward_twin(x, dy, scale)
    assert len(got) == len(expected) == (4 if scaled else 2)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])
    if scaled:
        assert_float8(got[2:], expected[2:], x)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rank", [0, 5, 32])
def test_scale_add_low_rank(transposed, scaled, rank):
    raw = draw(96, 2 * WIDTH, scale=30)  # padded rows, and columns that another call takes
    row_scale = power_of_two_scale(jnp.abs(draw(96, seed=1, dtype=jnp.float32)), FORWARD)
    low = draw(TOKENS, 2 * rank, seed=2) if rank else None
    high = draw(*((WIDTH, rank) if transposed else (rank, WIDTH)), seed=3) if rank else None
    args = (
        raw,
        row_scale if scaled else None,
        jnp.asarray([0.25, 0.125]) if scaled else None,
        draw(2 * WIDTH, seed=4),
        low,
        high,
    )
    options = {"num_rows": TOKENS, "columns": slice(WIDTH, 2 * WIDTH), "transposed": transposed}
    got = kernels.scale_add_low_rank(*args, **options, interpret=INTERPRET)
    assert got.shape == (TOKENS, WIDTH)
    assert_close(got, matmul.scale_add_low_rank_twin(*args, **options))
