"""Attention against its formula in float64, and the choice of the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.model.attention import attend, attend_even, attention_backend


def draw(scale: float = 1.0) -> list[np.ndarray]:
    """Queries and keys of different number, so that neither can stand in for the other."""
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 3, 20), (2, 11, 3, 20), (2, 11, 3, 20))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [scale * q, k, v]


@pytest.mark.parametrize("scale", [1.0, 300.0])  # the second overflows a softmax without a shift
def test_attend_is_the_formula(scale):
    q, k, v = draw(scale)
    got = attend(*map(jnp.asarray, (q, k, v)))
    assert got.dtype == jnp.float32
    logits = np.einsum("blhk,bshk->bhls", q, k, dtype=np.float64) / np.sqrt(20)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhls,bshk->blhk", weights, v)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_bfloat16_is_rounded_once_on_a_cpu():
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in draw()]
    got = attend(*qkv)
    assert got.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in qkv))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (7, 11), (7, 8), (8, 7), (8, 8)])
def test_an_odd_number_of_rows_is_made_even_without_a_trace(queries, keys):
    q, k, v = (jnp.asarray(x) for x in draw())
    q, k, v = (jnp.tile(x, (1, 2, 1, 1)) for x in (q, k, v))
    arrays = q[:, :queries], k[:, :keys], v[:, :keys]

    def differentiate(attend):
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(jnp.cos(out))

    got = differentiate(lambda *qkv: attend_even(*qkv, implementation="xla"))
    wanted = differentiate(attend)
    for each, expected in zip(got, wanted, strict=True):
        assert each.shape == expected.shape
        np.testing.assert_allclose(each, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "backend"),
    [
        ("gpu", "bfloat16", 128, "cudnn"),
        ("gpu", "float16", 64, "cudnn"),
        ("gpu", "float32", 128, "xla"),
        ("gpu", "bfloat16", 28, "xla"),
        ("gpu", "bfloat16", 136, "xla"),
        ("cpu", "bfloat16", 128, "xla"),
    ],
)
def test_backend(platform, dtype, head_dim, backend):
    assert attention_backend(platform, dtype, head_dim) == backend
