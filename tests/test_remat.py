"""What the backward pass keeps and what waits on the host: the same numbers, and really so."""

import functools
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from test_block_weights import place
from test_step import mean_loss

from wan22_jax.batch import Batch
from wan22_jax.geometry import Bucket
from wan22_jax.model import fp8
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.remat import _FUSED_ATTENTION, POLICIES
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig, WanTransformer
from wan22_jax.training.draws import Draws, TaskMix
from wan22_jax.training.step import Frozen, StepSettings, init_state, split_model, train_step
from wan22_jax.weights import keeps_float32

BLOCKS, SWAP = 5, 2
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

SENDING = {"unsloth": 3, "offload_attention": 3, "offload_matmuls": 1}  # of BLOCKS

long = partial(pytest.param, marks=pytest.mark.long)
every_policy = pytest.mark.parametrize("policy", POLICIES)


class Run(NamedTuple):
    """One policy's loss and gradients, and how they were computed."""

    values: list[np.ndarray]
    equations: list


@functools.cache
def make_abstract(config: TransformerConfig, dtype: str, rank: int) -> tuple:
    """The structure of a model, and its adapter and frozen weights without values."""

    def make() -> tuple[nnx.State, nnx.State]:
        nonlocal graphdef
        model = WanTransformer(config, rngs=nnx.Rngs(0))
        if dtype == "float8":
            model.to_float8()
        model.add_lora(jax.random.key(1), rank=rank, alpha=3.0 * rank)
        graphdef, trainable, frozen = split_model(model)
        flat = [(path, narrow(path, leaf)) for path, leaf in nnx.to_flat_state(frozen)]
        narrowed = nnx.from_flat_state(dict(flat))
        return trainable, frozen if dtype == "float32" else narrowed

    graphdef = None
    return *jax.eval_shape(make), graphdef


@functools.cache
def make_weights(dtype: str) -> tuple:
    """Values for a tiny model, so that no gradient is zero."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == (BLOCKS,):
            return jnp.full(leaf.shape, 2.0**-9, leaf.dtype)  # scales of float8 weights
        std = 64 if fp8.is_float8(leaf.dtype) else leaf.shape[-1] ** -0.5
        return jnp.asarray((std * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    trainable, frozen, graphdef = make_abstract(CONFIG, dtype, RANK)
    return *jax.tree.map(draw, (trainable, frozen)), graphdef


@functools.cache
def differentiate(policy: bool | str, swap: int) -> Run:
    """Compiles and runs the gradient in float32."""
    trainable, frozen, graphdef = make_weights("float32")
    loss = mean_loss(graphdef, policy)
    args = (trainable, place(frozen, policy, swap), *draw_inputs())
    return run_exactly(jax.value_and_grad(loss), args)


@functools.cache
def take_step(policy: bool | str, swap: int) -> Run:
    """Compiles and runs a float8 train step of two micro-batches; gives metrics and gradients."""
    trainable, frozen, graphdef = make_weights("float8")
    keeps_gradients = optax.trace(0.0)  # as the optimizer's state
    step = partial(
        train_step,
        graphdef=graphdef,
        optimizer=keeps_gradients,
        settings=StepSettings(TaskMix(0.5), activation_checkpointing=policy),
    )

    def run(*args: Any) -> tuple:
        state, metrics = step(*args)
        return metrics, state.opt_state

    latents, text, _ = draw_inputs()
    batch = Batch(latents[:, None], text[:, None])
    grid = jnp.asarray(sigma_grid())
    state = init_state(trainable, keeps_gradients)
    args = (state, place(frozen, policy, swap), batch, jax.random.key(0), grid)
    return run_exactly(run, args)


def run_exactly(function, args: tuple) -> Run:
    traced = jax.jit(function, compiler_options=EXACT).trace(*args)
    results = traced.lower().compile()(*args)
    values = [np.asarray(leaf) for leaf in jax.tree.leaves(results)]
    return Run(values, list(find_equations(traced.jaxpr)))


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
        for inner in find_programs(equation):
            yield from find_equations(inner)


def find_programs(equation) -> list:
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [leaf for leaf in leaves if is_program(leaf)]


def is_program(value) -> bool:
    return hasattr(value, "eqns")


# The numbers


@pytest.mark.parametrize(
    "policy",
    [
        policy if policy in (True, "offload_attention", "offload_matmuls") else long(policy)
        for policy in POLICIES
    ],
)
def test_no_policy_changes_a_bit(policy):
    """Compiled; one block that stays on the device, two that are swapped."""
    expected = differentiate(False, 0).values
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    assert len(expected) == 21
    for got, want in zip(differentiate(policy, SWAP).values, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.long
@pytest.mark.parametrize(("policy", "swap"), [(False, BLOCKS), ("offload_attention", 0)])
def test_nor_in_float8_steps_of_two_micro_batches(policy, swap):
    """No block is swapped, or all are."""
    expected = take_step(False, 0).values
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    assert len(expected) == 25
    for got, want in zip(take_step(policy, swap).values, expected, strict=True):
        np.testing.assert_array_equal(got, want)


# That the knob is on


@every_policy
def test_what_waits_on_the_host_is_fetched_and_sent(policy):
    """Copied numbers: matrices in both passes, activations out once and in once."""
    run = differentiate(policy, SWAP)
    equations = [e for e in run.equations if e.primitive.name == "device_put"]
    puts = [variable.aval for equation in equations for variable in equation.outvars]
    out = [aval for aval in puts if aval.memory_space == jax.memory.Space.Host]
    assert len(out) == SENDING.get(policy, 0) * num_saved(policy)
    matrices = 8 * CONFIG.dim**2 + 2 * CONFIG.dim * CONFIG.ffn_dim
    sizes = [sum(aval.size for aval in avals) for avals in (puts, out)]
    assert sizes[0] == 2 * SWAP * matrices + 2 * sizes[1]


def num_saved(policy: bool | str) -> int:
    kept = [*INPUT, *KEPT.get(policy, [])]  # below; CPUs keep no statistics of attention
    return sum(shape != STATISTICS for _, shape in kept)


@every_policy
def test_copies_are_bounded_by_the_blocks_beside_them(policy):
    """Fetches wait for the block before to begin, sends are over three blocks later."""
    run = differentiate(policy, SWAP)
    fetches, sends, released, awaited = [], [], set(), {}
    for index, equation in enumerate(run.equations):
        if equation.primitive.name == "optimization_barrier":
            released |= set(map(id, equation.outvars))
            awaited = {id(variable): index for variable in equation.invars} | awaited
        elif equation.primitive.name == "device_put":
            for source, copy in zip(equation.invars, equation.outvars, strict=True):
                is_send = copy.aval.memory_space == jax.memory.Space.Host
                (sends if is_send else fetches).append((index, id(source), id(copy)))
    # Nothing comes before the first block of either pass; the first of all is resident, and what
    # the last one keeps is not sent.
    unbound = [index for index, source, _ in fetches if source not in released]
    assert len(unbound) == (0 if policy in SENDING else 7) + 7
    start_of_backward = unbound[-7]
    num_over = sum(awaited[copy] < start_of_backward for _, _, copy in sends)
    assert num_over == min(2, SENDING.get(policy, 0)) * num_saved(policy)


@every_policy
def test_the_blocks_that_send_are_spread_evenly(policy):
    sends = [POLICIES[policy].sends(index, 30) for index in range(30)]
    assert not any(sends[-2:])  # what they keep is needed too soon
    expected = {"unsloth": 28, "offload_attention": 28, "offload_matmuls": 16}
    assert sum(sends) == expected.get(policy, 0)
    if policy == "offload_matmuls":
        assert all(sum(sends[start : start + 5]) == 3 for start in range(24))


@every_policy
def test_copies_have_the_whole_block_to_hide_behind(policy):
    """XLA's scheduler is told so of all that a streamed block computes."""
    trainable, frozen, graphdef = make_weights("float32")
    loss = mean_loss(graphdef, policy)
    args = (trainable, place(frozen, policy, BLOCKS), *draw_inputs())
    lines = jax.jit(jax.grad(loss)).lower(*args).as_text().splitlines()
    matmuls = [line for line in lines if "stablehlo.dot_general" in line]
    told = [line for line in matmuls if 'latency_metadata = "0"' in line]
    assert len(told) >= 3 * 10 * BLOCKS
    assert len(matmuls) - len(told) == 8  # before and after the blocks, with their gradients


# What is kept and what is computed again, in the 5B train step as a GPU traces it

L, S, D, F, R = 27_280, 512, 3072, 14336, 32  # 1280x704x121, rank 32
HEADS, STATISTICS, NUM_FRAMES = (1, L, 24, 128), (1, 24, L), 31
# Shapes by name of what one block leaves for the backward pass.
INPUT = [("block_input", (1, L, D))]
ATTENTION = [("attention", HEADS), ("attention", STATISTICS)]
LOW_RANK = [("low_rank", (L, 3 * R)), ("low_rank", (S, 2 * R)), *[("low_rank", (L, R))] * 5]
QKV = [*ATTENTION, *LOW_RANK, *[("qkv", (L, D))] * 3]
MATMULS = [*QKV, ("o", (L, D)), ("cross_q", (L, D)), ("ffn_in", (L, F))]
MATMULS += [*[("modulation", (NUM_FRAMES, D))] * 6, *[("cross_kv", (S, D))] * 2]
KEPT = {
    True: [],
    "unsloth": [],
    "keep_attention": ATTENTION,
    "offload_attention": ATTENTION,
    "keep_qkv": QKV,
    "keep_matmuls": [
        *[*MATMULS, *[("rotated", (L, D))] * 2, ("cross_o", (L, D))],
        *[("cross_attention", HEADS), ("cross_attention", STATISTICS)],
    ],
    "offload_matmuls": MATMULS,
}
# Attentions by name and float8 matmuls by the shape of their weight. The text's keys and values
# take 2 % of a matmul's time; what ffn.2 gives, no gradient asks for.
FORWARD = Counter({"attention": 1, "cross_attention": 1, (3 * D, D): 1, (D, D): 3, (2 * D, D): 1})
FORWARD += Counter({(F, D): 1, (D, F): 1})
ALL_AGAIN = FORWARD - Counter([(D, F)])
AGAIN = {
    True: ALL_AGAIN,
    "unsloth": ALL_AGAIN,
    "keep_attention": ALL_AGAIN - Counter(["attention"]),
    "offload_attention": ALL_AGAIN - Counter(["attention"]),
    "keep_qkv": ALL_AGAIN - Counter(["attention", (3 * D, D)]),
    "keep_matmuls": Counter(),
    "offload_matmuls": Counter(["cross_attention", (D, D)]),
}
README = (Path(__file__).parents[1] / "README.md").read_text()


@functools.cache
def trace_5b(policy: bool | str, dtype: str, swap: int | None):
    """Traces loss and gradient with the kernels of a GPU; swap None is the plain loop."""
    config = replace(TI2V_5B, num_layers=30 if swap is None else BLOCKS)
    bucket = Bucket(1280, 704, 121)
    assert bucket.num_tokens == L

    def differentiate(trainable, frozen, latents, text, draws):
        loss = mean_loss(graphdef, policy)
        frozen = Frozen(frozen) if swap is None else place(frozen, policy, swap)
        return jax.value_and_grad(loss)(trainable, frozen, latents, text, draws)

    trainable, frozen, graphdef = make_abstract(config, dtype, R)
    shape, num_frames = (1, *bucket.latent_TYX, 48), bucket.latent_TYX[0]
    latents, text, noise, per_frame = (
        jax.ShapeDtypeStruct(*each)
        for each in (
            (shape, jnp.bfloat16),
            ((1, S, 4096), jnp.bfloat16),
            (shape, jnp.float32),
            ((1, num_frames), jnp.float32),
        )
    )
    draws = Draws(noise, per_frame, per_frame)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(fp8, "has_float8_matmul", lambda _: True)
        patch.setattr(cudnn, "check_cudnn_version", lambda *_: 91300)
        patch.setattr(cudnn, "check_compute_capability", lambda *_: True)
        return jax.make_jaxpr(differentiate)(trainable, frozen, latents, text, draws).jaxpr


def find_kept(program, swap: int | None) -> list:
    """The variables that the forward pass leaves for the backward pass of one block."""
    if swap is None:
        first, last = (e for e in program.eqns if e.primitive.name == "scan")
        read = set(filter(is_variable, last.invars))
        inner = getattr(first.params["jaxpr"], "jaxpr", first.params["jaxpr"]).outvars
        return [own for own, out in zip(inner, first.outvars, strict=True) if out in read]
    # What the backward pass waits for beside its block's weights, adapters and gradient.
    (*_, last) = find_backward_blocks(program)
    _, *values = filter(is_variable, last.invars)
    return [value for value in values if {L, S, NUM_FRAMES} & set(value.aval.shape)]


def find_backward_blocks(program) -> list:
    """The barriers before blocks of streamed parts; they alone wait for a block's small weights."""
    barriers = (e for e in program.eqns if e.primitive.name == "optimization_barrier")
    return [e for e in barriers if any(v.aval.shape == (1, 6, D) for v in e.invars)]


def is_variable(atom) -> bool:
    return not hasattr(atom, "val")  # as literals have


def name_values(program, variables) -> list[tuple[str, tuple]]:
    """The checkpoint_name, or the primitive it comes from, and the shape of each variable."""
    made_by = {out: equation for equation in program.eqns for out in equation.outvars}

    def name(variable) -> str:
        equation = made_by.get(variable)
        if equation is None:
            return "block_input"
        if equation.primitive.name in ("device_put", "reduce_precision", "optimization_barrier"):
            return name(equation.invars[equation.outvars.index(variable)])
        return name_attention(equation) or equation.params.get("name", equation.primitive.name)

    return [(name(variable), variable.aval.shape) for variable in variables]


def find_live(program):
    """``find_equations`` without those whose results nothing asks for; XLA drops them."""
    program = getattr(program, "jaxpr", program)
    asked = set(filter(is_variable, program.outvars))
    for equation in reversed(program.eqns):
        if asked & set(equation.outvars):
            asked |= set(filter(is_variable, equation.invars))
            yield equation
            for inner in find_programs(equation):
                yield from find_live(inner)


def name_attention(equation) -> str | None:
    if equation.primitive.name != _FUSED_ATTENTION:
        return None
    queries, keys, *_ = equation.invars
    return "attention" if queries.aval.shape == keys.aval.shape else "cross_attention"


def count_forward_work(program) -> Counter:
    """Attentions by name and products of float8 activations by the shape of their weight."""
    found: Counter = Counter()
    for equation in find_live(program):
        if name := name_attention(equation):
            found[name] += 1
        elif equation.primitive.name == "dot_general":
            x, weight = (variable.aval for variable in equation.invars)
            found[weight.shape] += x.dtype == fp8.FORWARD  # gradients are e5m2
    return +found


# Streamed, all blocks swapped; and the plain loop.
both_dtypes = pytest.mark.parametrize(("dtype", "swap"), [("float8", BLOCKS), ("bfloat16", None)])


@both_dtypes
@every_policy
def test_which_values_are_kept_and_where(policy, dtype, swap):
    program = trace_5b(policy, dtype, swap)
    body = program if swap else next(e for e in program.eqns if e.primitive.name == "scan")
    body = body if swap else getattr(body.params["jaxpr"], "jaxpr", body.params["jaxpr"])
    named = name_values(body, find_kept(program, swap))
    if swap:  # the first block's input comes from elsewhere
        assert named[0][1] == (1, L, D)
        named[0] = ("block_input", (1, L, D))
    kept = Counter(named)
    expected = Counter([*INPUT, *KEPT.get(policy, KEPT["keep_matmuls"])])
    if policy is False:  # keeps everything
        assert kept.total() > 1.5 * expected.total()
    else:
        assert kept == expected
    puts = (e for e in find_equations(program) if e.primitive.name == "device_put")
    sent = Counter(
        variable.aval.shape
        for equation in puts
        for variable in equation.outvars
        if variable.aval.memory_space == jax.memory.Space.Host
        and not fp8.is_float8(variable.aval.dtype)  # as weights are, when they are placed
    )
    num_sending = SENDING.get(policy, 0) if swap else 0
    assert sent == Counter([shape for _, shape in expected.elements()] * num_sending)
    rounded = [e for e in find_equations(program) if e.primitive.name == "reduce_precision"]
    assert not any(fp8.is_float8(e.outvars[0].aval.dtype) for e in rounded)


@both_dtypes
@every_policy
def test_which_work_is_done_again(policy, dtype, swap):
    work = FORWARD + AGAIN.get(policy, Counter())
    if dtype == "bfloat16":  # where the matmuls of both directions look alike
        work = Counter({name: work[name] for name in ("attention", "cross_attention")})
    expected = Counter({key: (BLOCKS if swap else 1) * count for key, count in work.items()})
    assert count_forward_work(trace_5b(policy, dtype, swap)) == expected


@both_dtypes
@every_policy
def test_bytes_are_those_that_the_readme_says(policy, dtype, swap):
    kept = find_kept(trace_5b(policy, dtype, swap), swap)
    gigabytes = sum(v.aval.size * v.aval.dtype.itemsize for v in kept) / 1e9  # a block
    key = f"'{policy}'" if isinstance(policy, str) else str(policy).lower()
    (row,) = re.findall(rf"^\| `{key}` \|[^|]*\|([^|]*)\|([^|]*)\|", README, re.MULTILINE)
    if policy is False:
        assert row[0].strip() == "too much"
        assert gigabytes > 4
        return
    num_sending = sum(POLICIES[policy].sends(index, 30) for index in range(30))
    counts = (30 - num_sending, num_sending)
    expected = [f"{count * gigabytes:.0f} GB" if count > 2 else "" for count in counts]
    assert [cell.strip() for cell in row] == expected


@both_dtypes
@every_policy
def test_loss_and_gradients_have_their_shapes(policy, dtype, swap):
    loss, *gradients = (v.aval for v in trace_5b(policy, dtype, swap).outvars)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    config = replace(TI2V_5B, num_layers=30 if swap is None else BLOCKS)
    trainable, _, _ = make_abstract(config, dtype, R)
    expected = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(trainable)]
    assert [(leaf.shape, leaf.dtype) for leaf in gradients] == expected
    assert len(expected) == 20


@every_policy
def test_nothing_made_of_fetched_weights_alone_is_kept(policy):
    program = trace_5b(policy, "float8", BLOCKS)
    fetched = find_fetched(program)
    assert sum(v.aval.size for v in fetched) == 2 * BLOCKS * (8 * D * D + 2 * D * F)
    made = set(fetched)
    for equation in program.eqns:
        inputs = set(filter(is_variable, equation.invars))
        if inputs and inputs <= made:
            made |= set(equation.outvars)
    for block in find_backward_blocks(program):
        assert not made & set(filter(is_variable, block.invars))


def find_fetched(program) -> list:
    return [
        out
        for equation in find_equations(program)
        if equation.primitive.name == "device_put"
        for out, source in zip(equation.outvars, equation.invars, strict=True)
        if source.aval.memory_space == jax.memory.Space.Host and fp8.is_float8(source.aval.dtype)
    ]


@pytest.mark.parametrize("policy", [name for name in KEPT if not POLICIES[name].on_host])
def test_straight_code_keeps_and_does_again_the_same(policy):
    program = trace_5b(policy, "float8", 0)
    blocks = [equation for equation in program.eqns if equation.primitive.name == "remat2"]
    assert len(blocks) == BLOCKS
    names = {name for name, _ in KEPT["keep_matmuls"]}
    for block in blocks:
        values = name_values(program, filter(is_variable, block.invars))
        named = Counter(value for value in values if value[0] in names)
        assert named == Counter(KEPT[policy])
        others = Counter(shape for name, shape in values if name not in names and L in shape)
        assert others == {(1, L, D): 2, (L, 64): 2}  # input and its gradient, rotation
        assert count_forward_work(block.params["jaxpr"]) == AGAIN[policy]
