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

from wan22_jax.model.remat import POLICIES, Streamed, _keeps
from wan22_jax.model.transformer import FlatState, TransformerConfig, WanTransformer
from wan22_jax.training.step import Draws, Frozen, loss_fn, place_frozen, split_model
from wan22_jax.weights import keeps_float32

BLOCKS, SWAP = 3, 2
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
    """Compiled; one resident block and two that are swapped."""
    expected = differentiate(False, 0).values
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    assert len(expected) == 21
    for got, want in zip(differentiate(policy, SWAP).values, expected, strict=True):
        np.testing.assert_array_equal(got, want)


# That the knob is on

# Values that a policy names, as a block has them.
NUM_KEPT = {
    True: 0,
    "unsloth": 0,
    "keep_attention": 1,
    "offload_attention": 1,
    "keep_qkv": 1 + 3 + 7,  # attention, q, k, v and seven products with A
    "keep_matmuls": 2 + 3 + 7 + 2 + 4,  # both attentions; rotated q, k; o, cross_q, cross_o, ffn_in
    "offload_matmuls": 2 + 3 + 7 + 2 + 4,
}


@every_policy
def test_what_waits_on_the_host_is_fetched_and_sent(policy):
    """Copies in the program: weights in both passes, activations out once and in once."""
    run = differentiate(policy, SWAP)
    equations = [e for e in run.equations if e.primitive.name == "device_put"]
    puts = [variable.aval for equation in equations for variable in equation.outvars]
    out = [aval for aval in puts if aval.memory_space == jax.memory.Space.Host]
    num_sent = BLOCKS * (1 + NUM_KEPT[policy]) if POLICIES[policy].on_host else 0
    assert len(out) == num_sent
    weights = 2 * 10 * SWAP  # ten matrices, forward and backward
    assert len(puts) - len(out) == weights + len(out)


@every_policy
def test_copies_are_bounded_by_the_blocks_beside_them(policy):
    """Fetches wait for the block before to begin, sends are over when the block after is."""
    run = differentiate(policy, SWAP)
    tied = [e for e in run.equations if e.primitive.name == "optimization_barrier"]
    released = {id(variable) for equation in tied for variable in equation.outvars}
    awaited = {id(variable) for equation in tied for variable in equation.invars}
    fetches, sends = [], []
    for equation in run.equations:
        if equation.primitive.name == "device_put":
            for source, copy in zip(equation.invars, equation.outvars, strict=True):
                is_send = copy.aval.memory_space == jax.memory.Space.Host
                (sends if is_send else fetches).append((id(source), id(copy)))
    on_host = POLICIES[policy].on_host
    num_sent = 1 + NUM_KEPT[policy] if on_host else 0
    # Nothing comes before the first block of either pass; the first of all is resident.
    first = (0 if on_host else 10) + 10 + num_sent
    assert sum(source not in released for source, _ in fetches) == first
    # The last block's are not waited for in the forward pass.
    assert sum(copy not in awaited for _, copy in sends) == num_sent


@every_policy
def test_frozen_weights_lie_where_the_step_reads_them(policy):
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    by_path = {path: leaf[...] for path, leaf in nnx.to_flat_state(frozen["blocks"])}
    parts = place(frozen, policy, SWAP).parts
    blocks: list[FlatState] = []
    for part in parts:
        if isinstance(part, list):
            blocks += part
            continue
        for on_device, on_host in zip(*part, strict=True):
            for path, leaf in on_host.items():
                assert leaf.sharding.memory_kind == "pinned_host", path
                assert leaf.ndim == 2, path
            for path, leaf in on_device.items():
                assert leaf.sharding.memory_kind == "device", path
            blocks.append({**on_device, **on_host})
    streamed = [part for part in parts if isinstance(part, Streamed)]
    num_matrices = [len(on_host) for part in streamed for on_host in part.on_host]
    resident = [0] * (BLOCKS - SWAP) if POLICIES[policy].on_host else []
    assert num_matrices == [*resident, *[10] * SWAP]
    assert len(blocks) == BLOCKS
    for index, block in enumerate(blocks):
        assert block.keys() == by_path.keys()
        for path, leaf in block.items():
            np.testing.assert_array_equal(leaf, by_path[path][index])


def test_more_blocks_to_swap_than_there_are_means_all():
    _, _, frozen = split_model(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    (part,) = place(frozen, False, 30).parts
    assert isinstance(part, Streamed)
    assert part.num_blocks == BLOCKS


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
        keeps = _keeps(POLICIES[policy].keep or ())
        assert keeps(primitive, queries, queries) is itself
        assert keeps(primitive, queries, keys) is text
