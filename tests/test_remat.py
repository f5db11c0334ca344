"""What the backward pass keeps and what waits on the host: the same numbers, and really so."""

import functools
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan22_jax.model.block_weights import join_linears, named_arrays
from wan22_jax.model.remat import POLICIES, Stack, _keeps
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.training.step import Draws, Frozen, loss_fn, place_frozen, split_model
from wan22_jax.weights import keeps_float32

BLOCKS = 2
CONFIG = TransformerConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=BLOCKS, text_dim=8, text_len=6, freq_dim=16
)
ROWS, LENGTH, RANK = 24, 12, 2  # two examples of 3 frames of 2 x 2 tokens

# What a value is fused with decides how XLA's CPU kernels round it: LLVM contracts x y + z to one
# rounding and sums rows in the order that vectorises best (it may: XLA marks reductions
# `reassoc`), and bfloat16 that does not leave a kernel is not rounded at all. A kept value is
# fused with other things than a recomputed one, so two policies differ in the last bits. These
# options switch off just that, and what is left has to agree bit for bit.
EXACT = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}

every_policy = pytest.mark.parametrize("policy", POLICIES)


class Run(NamedTuple):
    """One policy's loss and gradients, and how they were computed."""

    values: list[np.ndarray]
    equations: list


@functools.cache
def differentiate(policy: bool | str, swap: int | None, dtype: str = "float32") -> Run:
    """Compiles and runs the gradient; swap None is the plain loop over a stack."""
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    if dtype == "float8":
        model.to_float8()
    model.add_lora(jax.random.key(1), rank=RANK, alpha=6.0)
    graphdef, trainable, frozen = split_model(model)
    if dtype != "float32":
        frozen = nnx.from_flat_state(
            {path: narrow(path, leaf) for path, leaf in nnx.to_flat_state(frozen)}
        )
    trainable = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), trainable
    )
    placed = Frozen(frozen) if swap is None else place(frozen, policy, swap)
    loss = partial(loss_fn, graphdef=graphdef, activation_checkpointing=policy)
    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=EXACT)
    args = (trainable, placed, *draw_inputs())
    traced = gradient.trace(*args)
    compiled = traced.lower().compile()
    values = [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(*args))]
    return Run(values, list(find_equations(traced.jaxpr)))


def place(frozen: nnx.State, policy: bool | str, swap: int) -> Frozen:
    return place_frozen(
        frozen,
        activation_checkpointing=policy,
        blocks_to_swap=swap,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )


def narrow(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
    is_exact = leaf.dtype != jnp.float32 or path[-1] == "weight_scale"
    name = ".".join(map(str, path))
    return leaf if is_exact or keeps_float32(name) else leaf.replace(leaf.astype(jnp.bfloat16))


def draw_inputs() -> tuple:
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.normal(size=(2, 3, 4, 4, 48)), jnp.float32) for _ in range(2))
    text = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    sigma = jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
    return clean, text, Draws(noise, sigma, jnp.ones((2, 3)))


def find_equations(program):
    """Yields the equations of a program and of its inner programs."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
        for value in filter(is_program, inner):
            yield from find_equations(value)


def is_program(value) -> bool:
    return hasattr(value, "eqns")


# The numbers


@every_policy
def test_no_policy_changes_a_bit(policy):
    """Compiled; one block as straight code (or in a loop), one that is swapped."""
    expected = differentiate(False, 0).values
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    assert len(expected) == 21
    for got, want in zip(differentiate(policy, 1).values, expected, strict=True):
        np.testing.assert_array_equal(got, want)


# That the knob is on

# Values that a policy names, as a block has them.
NUM_KEPT = {
    True: 0,
    "unsloth": 0,
    "keep_attention": 1,
    "offload_attention": 1,
    "keep_qkv": 1 + 3 + 7,  # attention, q, k, v and seven products with A
    "offload_matmuls": 2 + 3 + 7 + 2 + 4,  # and rotated q, k; o, cross_q, cross_o, ffn_in
}


@every_policy
def test_what_waits_on_the_host_is_fetched_and_sent(policy):
    """Copies in the program: weights in both passes, activations out once and in once."""
    swap = 1
    run = differentiate(policy, swap)
    equations = [e for e in run.equations if e.primitive.name == "device_put"]
    puts = [variable.aval for equation in equations for variable in equation.outvars]
    out = [aval for aval in puts if aval.memory_space == jax.memory.Space.Host]
    stacks = (swap > 0) + (swap < BLOCKS) if POLICIES[policy].on_host else 0
    num_saved = 1 + NUM_KEPT.get(policy, 0)
    assert len(out) == stacks * num_saved
    weights = 2 * 7 if swap else 0  # seven matrices, forward and backward
    assert len(puts) - len(out) == weights + len(out)


def test_keeping_matmuls_recomputes_none_but_of_the_softmax():
    matmuls = {
        policy: sum(e.primitive.name == "dot_general" for e in differentiate(policy, 0).equations)
        for policy in (False, "keep_matmuls", True)
    }
    logits = 2 * BLOCKS
    assert matmuls["keep_matmuls"] == matmuls[False] + logits
    assert matmuls[True] > matmuls["keep_matmuls"]


@every_policy
def test_frozen_weights_lie_where_the_step_reads_them(policy):
    swap = 1
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    by_name = named_arrays(frozen["blocks"])
    for module, names in (("self_attn", "qkv"), ("cross_attn", "kv")):
        for leaf in ("weight", "bias"):
            parts = [by_name.pop(f"{module}.{name}.{leaf}") for name in names]
            by_name[f"{module}.{names}.{leaf}"] = np.concatenate(parts, axis=1)
    parts = place(frozen, policy, swap).parts
    blocks: list[dict] = []
    for part in parts:
        if isinstance(part, list):
            blocks += part
            continue
        assert isinstance(part, Stack)
        for name, leaf in part.on_host.items():
            assert leaf.sharding.memory_kind == "pinned_host", name
            assert leaf.ndim == 3, name
        for name, leaf in part.on_device.items():
            assert leaf.sharding.memory_kind == "device", name
        rows = {**part.on_device, **part.on_host}
        blocks += [{name: leaf[i] for name, leaf in rows.items()} for i in range(part.num_blocks)]
    on_host = [part for part in parts if isinstance(part, Stack) and part.on_host]
    assert sum(part.num_blocks for part in on_host) == swap
    assert all(len(part.on_host) == 7 for part in on_host)
    assert any(isinstance(part, list) for part in parts) == (
        swap < BLOCKS and not POLICIES[policy].on_host
    )
    assert len(blocks) == BLOCKS
    for index, block in enumerate(blocks):
        assert block.keys() == by_name.keys()
        for name, leaf in block.items():
            np.testing.assert_array_equal(leaf, by_name[name][index])


def test_more_blocks_to_swap_than_there_are_means_all():
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    (part,) = place(frozen, False, 30).parts
    assert isinstance(part, Stack)
    assert part.num_blocks == BLOCKS


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


def test_the_fused_attention_of_gpus_is_named_by_its_primitive():
    """It has no checkpoint_name, lest its softmax statistics are computed again."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    primitive = cudnn._dot_product_attention_fwd_p_wrapper
    queries, keys = SimpleNamespace(shape=(1, 12, 2, 16)), SimpleNamespace(shape=(1, 6, 2, 16))
    for policy, itself, text in (
        (True, False, False),
        ("keep_attention", True, False),
        ("keep_matmuls", True, True),
    ):
        keeps = _keeps(POLICIES[policy].keep or (), on_host=False)
        assert keeps(primitive, queries, queries) is itself
        assert keeps(primitive, queries, keys) is text
