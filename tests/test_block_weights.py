"""Joined weights: the same numbers, in the same kind of memory."""

import numpy as np
import pytest
from flax import nnx

from wan22_jax.model.block_weights import join_linears, named_arrays
from wan22_jax.model.remat import POLICIES, Streamed
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.step import Frozen, split_model

BLOCKS, SWAP = 3, 2
CONFIG = TransformerConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=BLOCKS, text_dim=8, text_len=6, freq_dim=16
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


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_weights_lie_where_the_step_reads_them(policy):
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    by_name = named_arrays(frozen["blocks"])
    for module, names in (("self_attn", "qkv"), ("cross_attn", "kv")):
        for leaf in ("weight", "bias"):
            parts = [by_name.pop(f"{module}.{name}.{leaf}") for name in names]
            by_name[f"{module}.{names}.{leaf}"] = np.concatenate(parts, axis=1)
    parts = place(frozen, policy, SWAP).parts
    blocks: list[dict] = []
    for part in parts:
        if isinstance(part, list):
            blocks += part
            continue
        for on_device, on_host in zip(*part, strict=True):
            for name, leaf in on_host.items():
                assert leaf.sharding.memory_kind == "pinned_host", name
                assert leaf.ndim == 2, name
            for name, leaf in on_device.items():
                assert leaf.sharding.memory_kind == "device", name
            blocks.append({**on_device, **on_host})
    streamed = [part for part in parts if isinstance(part, Streamed)]
    num_matrices = [len(on_host) for part in streamed for on_host in part.on_host]
    resident = [0] * (BLOCKS - SWAP) if POLICIES[policy].on_host else []
    assert num_matrices == [*resident, *[7] * SWAP]
    assert len(blocks) == BLOCKS
    for index, block in enumerate(blocks):
        assert block.keys() == by_name.keys()
        for name, leaf in block.items():
            np.testing.assert_array_equal(leaf, by_name[name][index])


def test_more_blocks_to_swap_than_there_are_means_all():
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    (part,) = place(frozen, False, 30).parts
    assert isinstance(part, Streamed)
    assert part.num_blocks == BLOCKS


def place(frozen: nnx.State, policy: bool | str, swap: int) -> Frozen:
    return place_frozen(
        frozen,
        activation_checkpointing=policy,
        blocks_to_swap=swap,
        sharding=replicated(make_mesh()),
    )
