"""Each GPU kernel against its plain JAX twin; in interpret mode where there is no GPU.

But for the matmul for Hopper, which ``test_benchmarks.py`` checks: its interpreter needs a process
of its own.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model import fused, hopper_matmul, kernels, matmul
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
    static = (1e-6, jnp.dtype(jnp.bfloat16), quantize, True)
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
        alone = kernels.residual_norm(x, y, gates, weight, shift, **options, rows=False)
        for one, other in zip(alone[branch:], got[1:], strict=True):
            np.testing.assert_array_equal(one[:TOKENS], other[:TOKENS])


@pytest.mark.parametrize(("branch", "gate"), [(False, False), (True, False), (True, True)])
def test_residual_norm_backward(branch, gate):
    x = draw(TOKENS, WIDTH, dtype=jnp.float32)
    y = draw(TOKENS, WIDTH, seed=1, dtype=jnp.float32) if branch else None
    gates = draw(6, WIDTH, seed=2, dtype=jnp.float32) if gate else None
    weight = 1 + draw(6, WIDTH, seed=3, scale=0.2, dtype=jnp.float32)
    shift = draw(6, WIDTH, seed=4, dtype=jnp.float32)
    dx, dy = draw(TOKENS, WIDTH, seed=5), draw(TOKENS, WIDTH, seed=6)

    def twin(x, y):
        return fused.residual_norm_twin(
            (1e-6, jnp.float32, False, True), x, y, gates, weight, shift
        )

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
        alone = kernels.gelu_quantize(x, quantize=True, rows=False, interpret=INTERPRET)
        for one, other in zip(alone, got[1:], strict=True):
            np.testing.assert_array_equal(one[:TOKENS], other[:TOKENS])


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


CORES = 4
MATMUL = {"rows": 192, "num_in": 256, "num_out": 512, "groups": 1, "rank": 16}


def draw_matmul(*, rows: int, num_in: int, num_out: int, groups: int, rank: int) -> tuple:
    """The arguments of ``multiply_add`` with float8 matrices."""
    scale = jnp.asarray([0.25, 2.0, 1.0])[:groups]
    highs = (
        tuple(draw(num_out // groups, rank, seed=seed) for seed in range(groups)) if rank else ()
    )
    return (
        draw(rows, num_in).astype(FORWARD),
        draw(num_out, num_in, seed=1).astype(FORWARD),
        power_of_two_scale(jnp.abs(draw(rows, seed=2, dtype=jnp.float32)), FORWARD),
        scale,
        draw(num_out, seed=3),
        draw(rows, groups * rank, seed=4) if rank else None,
        highs or (None,) * groups,
    )


@pytest.mark.parametrize(
    ("capability", "version", "platform", "cores"),
    [
        ("9.0", (0, 11, 2), "gpu", 132),
        ("9.0", (0, 11, 0), "gpu", 132),
        ("9.0", (0, 10, 2), "gpu", 0),
        ("10.0", (0, 11, 2), "gpu", 0),
        ("8.9", (0, 11, 2), "gpu", 0),
        (None, (0, 11, 2), "cpu", 0),
    ],
)
def test_hopper_is_known_by_its_capability(capability, version, platform, cores, monkeypatch):
    has = {} if capability is None else {"compute_capability": capability, "core_count": 132}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(**has)])
    monkeypatch.setattr(jax, "__version_info__", version)
    assert hopper_matmul.count_cores.__wrapped__(platform) == cores


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"groups": 2}, True),
        ({"groups": 3, "num_out": 768, "rank": 96}, True),
        ({"rows": 128}, False),  # two tiles for four multiprocessors
        ({"rows": 144}, True),
        ({"num_out": 640, "rows": 512}, False),
        ({"groups": 2, "num_out": 768}, False),
        ({"num_in": 192}, False),
        ({"rank": 8}, False),
        ({"rank": 0}, True),  # without an adapter
    ],
)
def test_one_kernel_is_taken_for_the_shapes_that_it_fits(change, is_taken, monkeypatch):
    calls = []

    def multiply_add(*args, **options):
        calls.append(options)
        return matmul.multiply_then_add(*args, num_rows=options["num_rows"], transposed=True)

    monkeypatch.setattr(hopper_matmul, "multiply_add", multiply_add)
    sizes = MATMUL | change
    args, options = draw_matmul(**sizes), {"num_rows": sizes["rows"], "transposed": True}
    expected = matmul.multiply_add(*args, **options)
    assert not calls  # on this machine
    monkeypatch.setattr(hopper_matmul, "count_cores", lambda _: CORES)
    got = matmul.multiply_add(*args, **options)
    assert calls == [options | {"num_cores": CORES}] * is_taken
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_other_types_are_left_to_two_kernels(dtype, monkeypatch):
    monkeypatch.setattr(hopper_matmul, "count_cores", lambda _: CORES)
    monkeypatch.setattr(hopper_matmul, "multiply_add", None)
    x, weight, row_scale, scale, bias, low, highs = draw_matmul(**MATMUL)
    options = {"num_rows": x.shape[0], "transposed": True}
    wide = x.astype(dtype), weight.astype(dtype), None, None, bias, low.astype(dtype), highs
    assert matmul.multiply_add(*wide, **options)[0].dtype == dtype
    low = low.astype(jnp.float32)  # the adapter of a model in float32
    assert matmul.multiply_add(x, weight, row_scale, scale, bias, low, highs, **options)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel is written for jax 0.11")
def test_calls_of_the_same_shapes_share_one_kernel(monkeypatch):
    monkeypatch.setattr(hopper_matmul, "count_cores", lambda _: CORES)
    same, other = draw_matmul(**MATMUL), draw_matmul(**MATMUL | {"num_in": 384})

    @jax.checkpoint
    def block(*args):
        (out,) = matmul.multiply_add(*args, num_rows=MATMUL["rows"], transposed=True)
        return out.sum()

    program = jax.make_jaxpr(lambda *each: [block(*args) for args in each])(same, same, other)
    blocks = [each.params["jaxpr"] for each in program.eqns if "policy" in each.params]
    calls = [
        each.params["jaxpr"]
        for block in blocks
        for each in block.eqns
        if each.params.get("name") == "multiply_add"
    ]
    assert len(calls) == 3
    assert calls[0] is calls[1]
    assert calls[0] is not calls[2]
