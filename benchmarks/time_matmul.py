"""Is one kernel for matmul, scales, bias and adapter faster than two, and as exact? On one H100.

Every linear of a block, forward and backward, at the token counts of the published figures: cuBLAS
and ``scale_add_low_rank`` (``matmul.multiply_then_add``) against ``hopper_matmul.multiply_add``. An
error is the largest of all numbers, relative to |result| + the standard deviation of all. Both sum
on tensor cores that hold some 14 bits: XLA asks cuBLAS for fast accumulation.

    python benchmarks/time_matmul.py
    python benchmarks/time_matmul.py --rank 0       # without an adapter, as in sampling
    python benchmarks/time_matmul.py --tune         # with other schedules too: minutes
    python benchmarks/time_matmul.py --interpret    # is it right? on a CPU, with jax 0.11 or newer
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wan22_jax.model import hopper_matmul, kernels, matmul
from wan22_jax.model.fp8 import BACKWARD, FORWARD
from wan22_jax.model.hopper_matmul import DEFAULT, Schedule
from wan22_jax.sharding import claim_gpu


class Case(NamedTuple):
    """One linear of a block in one direction."""

    name: str
    num_in: int
    num_out: int  # of all groups
    groups: int
    rank: int  # of one group forward, of all of them backward
    forward: bool
    count: int  # of it in a block


FORWARD_CASES = (
    Case("self q, k, v", 3072, 9216, 3, 32, True, 1),
    Case("o, cross q, cross o", 3072, 3072, 1, 32, True, 3),
    Case("ffn.0", 3072, 14336, 1, 32, True, 1),
    Case("ffn.2", 14336, 3072, 1, 32, True, 1),
)
BACKWARD_CASES = (
    Case("self q, k, v", 9216, 3072, 1, 96, False, 1),
    Case("o, cross q, cross o", 3072, 3072, 1, 32, False, 3),
    Case("ffn.0", 14336, 3072, 1, 32, False, 1),
    Case("ffn.2", 3072, 14336, 1, 32, False, 1),
)
OTHER_SCHEDULES = Schedule(band=4), Schedule(band=16), Schedule(cluster=1)
NUM_CALLS, NUM_WEIGHTS = 8, 4  # more weights than level 2 cache holds, as in a step
TINY = Case("tiny", 256, 768, 3, 32, True, 1), Case("tiny", 512, 256, 1, 96, False, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2304, 27280])
    parser.add_argument("--rank", type=int, help="of the adapter, 0 for none")
    parser.add_argument("--tune", action="store_true", help="try other schedules too")
    parser.add_argument("--interpret", action="store_true", help="check tiny sizes without a GPU")
    args = parser.parse_args()
    if args.interpret:
        schedules = [Schedule(cluster=n) for n in (1, 2)]
        cases = (*TINY, TINY[0]._replace(rank=0))
        errors = [check_interpreted(case, 206, each) for case in cases for each in schedules]
        print("RESULT " + json.dumps({"error": max(errors)}))
        return
    claim_gpu()
    schedules = (DEFAULT, *OTHER_SCHEDULES) if args.tune else (DEFAULT,)
    for tokens in args.tokens:
        two_ms = one_ms = 0.0
        print("| tokens | linear | two us, error | one us, error | TFLOP/s | ratio | schedule |")
        print("| --- " * 7 + "|")
        for case in list_cases(args.rank):
            operands, weights = draw(case, tokens, num_weights=NUM_WEIGHTS)
            wanted = compute_wanted(case, tokens, weights[0], *operands)
            two_s, outs = time_calls(case, tokens, matmul.multiply_then_add, operands, weights)
            two_error = float(error_of(outs, wanted))
            timed = [
                (*time_calls(case, tokens, one_kernel(each), operands, weights), each)
                for each in schedules
            ]
            one_s, outs, best = min(timed, key=lambda row: row[0])
            one_error = float(error_of(outs, wanted))
            flops = 2 * tokens * case.num_in * case.num_out
            way = "forward" if case.forward else "backward"
            cells = (
                *(f"{tokens:,}", f"{case.name}, {way}"),
                *(f"{1e6 * two_s:.0f}, {two_error:.1e}", f"{1e6 * one_s:.0f}, {one_error:.1e}"),
                *(f"{flops / one_s / 1e12:.0f}", f"{two_s / one_s:.2f}", " ".join(map(str, best))),
            )
            print("| " + " | ".join(cells) + " |", flush=True)
            two_ms += 30 * case.count * 1e3 * two_s
            one_ms += 30 * case.count * 1e3 * one_s
        result = {"tokens": tokens, "two_ms": round(two_ms, 2), "one_ms": round(one_ms, 2)}
        print("RESULT " + json.dumps(result), flush=True)


def list_cases(rank: int | None) -> list[Case]:
    """Every linear in both directions; without an adapter there is only one."""
    if rank == 0:
        return [case._replace(rank=0) for case in FORWARD_CASES]
    return [
        case if rank is None else case._replace(rank=case.rank * rank // FORWARD_CASES[0].rank)
        for case in (*FORWARD_CASES, *BACKWARD_CASES)
    ]


@partial(jax.jit, static_argnums=(0, 1), static_argnames="num_weights")
def draw(case: Case, tokens: int, *, num_weights: int = 1) -> tuple[list[Any], list[jax.Array]]:
    """Draws (x, row_scale, scale, bias, low, high) and weights; rows are padded as in a step."""
    key = iter(jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 5))

    def numbers(*shape: int) -> jax.Array:  # this and the generator compile fast
        return jax.random.uniform(next(key), shape, minval=-2.0, maxval=2.0)

    padded = -(-tokens // kernels.ROWS) * kernels.ROWS
    total = case.rank * case.groups
    x = numbers(padded, case.num_in).astype(FORWARD if case.forward else BACKWARD)
    row_scale, scale = (2.0 ** (jnp.arange(n) * 5 % 6 - 3) for n in (padded, case.groups))
    bias = numbers(case.num_out).astype(jnp.bfloat16)
    low = numbers(tokens, total).astype(jnp.bfloat16)
    shape = (case.num_out, case.rank) if case.forward else (total, case.num_out)
    high = numbers(*shape).astype(jnp.bfloat16)
    low, high = (None, None) if case.rank == 0 else (low, high)
    shape = (case.num_out, case.num_in) if case.forward else (case.num_in, case.num_out)
    weight = numbers(*shape).astype(FORWARD)
    weights = [jnp.roll(weight, number, axis=0) for number in range(num_weights)]
    ends = [scale, bias] if case.forward else [None, None]
    return [x, row_scale, *ends, low, high], weights


def run(
    multiply_add: Callable[..., tuple[jax.Array, ...]],
    case: Case,
    tokens: int,
    weight: jax.Array,
    x: jax.Array,
    row_scale: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Calls it as the train step does, which transposes weights for the backward pass."""
    weight = weight if case.forward else weight.T
    highs = jnp.split(high, case.groups) if case.forward and high is not None else [high]
    highs = [None] * case.groups if high is None else highs
    args = (x, weight, row_scale, scale, bias, low, highs)
    return multiply_add(*args, num_rows=tokens, transposed=case.forward)


def one_kernel(schedule: Schedule) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel for this GPU."""
    num_cores = hopper_matmul.count_cores(jax.default_backend())
    assert num_cores, "an H100 or H200 is needed, and jax 0.11"
    return partial(hopper_matmul.multiply_add, num_cores=num_cores, schedule=schedule)


def check_interpreted(case: Case, tokens: int, schedule: Schedule) -> float:
    """The error of the kernel, run without a GPU."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    operands, (weight,) = draw(case, tokens)
    multiply_add = partial(
        hopper_matmul.multiply_add,
        num_cores=4,
        schedule=schedule,
        interpret=InterpretGPUParams(),
    )
    outs = run(multiply_add, case, tokens, weight, *operands)
    return float(error_of(outs, compute_wanted(case, tokens, weight, *operands)))


@partial(jax.jit, static_argnums=(0, 1))
def compute_wanted(
    case: Case,
    tokens: int,
    weight: jax.Array,
    x: jax.Array,
    row_scale: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
) -> jax.Array:
    """The result in float32, [tokens, num_out]."""
    dot = partial(jnp.dot, precision="highest", preferred_element_type=jnp.float32)
    low = jnp.zeros((tokens, 16 * case.groups)) if low is None else low
    high = jnp.zeros((case.num_out, 16)) if high is None else high
    weight, x, low, high = (each.astype(jnp.float32) for each in (weight, x, low, high))
    wanted = dot(x[:tokens], weight.T if case.forward else weight) * row_scale[:tokens, None]
    if scale is None or bias is None:
        return wanted + dot(low, high)
    wanted = wanted * jnp.repeat(scale, case.num_out // case.groups)[None]
    parts = zip(
        *(jnp.split(each, case.groups, axis) for each, axis in ((low, 1), (high, 0))), strict=True
    )
    added = [dot(low_g, high_g.T) for low_g, high_g in parts]
    return wanted + bias.astype(jnp.float32)[None] + jnp.concatenate(added, axis=1)


@jax.jit
def error_of(outs: tuple[jax.Array, ...], wanted: jax.Array) -> jax.Array:
    """The largest error of all numbers, relative to |wanted| + its standard deviation."""
    got = jnp.concatenate(outs, axis=1).astype(jnp.float32)
    return jnp.max(jnp.abs(got - wanted) / (jnp.abs(wanted) + jnp.std(wanted)))


def time_calls(
    case: Case,
    tokens: int,
    multiply_add: Callable[..., tuple[jax.Array, ...]],
    operands: list[Any],
    weights: list[jax.Array],
) -> tuple[float, tuple[jax.Array, ...]]:
    """The median time of a call among several in one program, and what the first one returns."""

    @jax.jit
    def run_all(weights: list, x: jax.Array, row_scale: jax.Array, *rest: Any) -> tuple:
        every: list[tuple] = []
        for number in range(NUM_CALLS):
            # None is computed beside another, or once for two.
            x, row_scale, every = jax.lax.optimization_barrier((x, row_scale, every))
            weight = weights[number % NUM_WEIGHTS]
            outs = run(multiply_add, case, tokens, weight, x, row_scale, *rest)
            every.append(outs if not every else tuple(out[0, 0] for out in outs))
        return every[0], every[1:]

    outs, _ = jax.block_until_ready(run_all(weights, *operands))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(run_all(weights, *operands))
        seconds.append((time.perf_counter() - start) / NUM_CALLS)
    return statistics.median(seconds), outs


if __name__ == "__main__":
    main()
