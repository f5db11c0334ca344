"""Joined weights: the same numbers, in the same kind of memory."""

import numpy as np
from flax import nnx

from wan22_jax.model.block_weights import join_linears, named_arrays
from wan22_jax.model.transformer import TransformerConfig, WanTransformer

CONFIG = TransformerConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
)


def test_joined_linears_keep_their_scales_and_where_they_lie():
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.to_float8()
    stacked = named_arrays(nnx.state(model.blocks))
    on_host = {name: np.asarray(leaf) for name, leaf in stacked.items()}
    joined = join_linears(on_host)
    scales = [stacked[f"self_attn.{name}.weight_scale"] for name in "qkv"]
    np.testing.assert_array_equal(joined["self_attn.qkv.weight_scale"], np.stack(scales, axis=1))
    assert joined["self_attn.qkv.weight"].dtype == stacked["self_attn.q.weight"].dtype
    assert all(isinstance(leaf, np.ndarray) for leaf in joined.values())
    one = join_linears({name: leaf[1] for name, leaf in on_host.items()})
    assert one.keys() == joined.keys() == join_linears(joined).keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, joined[name][1])
