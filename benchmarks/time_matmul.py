"""Is one kernel for matmul, scales, bias and adapter faster than two? On one H100.

Every linear of a block, forward and backward, at the token counts of the published figures: cuBLAS
and ``scale_add_low_rank`` as the train step calls them, against ``hopper_matmul.multiply_add``.

    python benchmarks/time_matmul.py
    python benchmarks/time_matmul.py --interpret    # is it right? on a CPU, with jax 0.11 or newer
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hopper_matmul
import jax
import jax.numpy as jnp
import numpy as np
from hopper_matmul import DEFAULT, Schedule

from wan22_jax.model import kernels, matmul
from wan22_jax.model.fp8 import BACKWARD, FORWARD
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
SCHEDULES = (DEFAULT, Schedule(band=4), Schedule(band=16), Schedule(cluster=1))
NUM_CALLS, NUM_WEIGHTS = 8, 4  # more weights than level 2 cache holds, as in a step
TINY = Case("tiny", 256, 768, 3, 32, True, 1), Case("tiny", 512, 256, 1, 96, False, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2304, 27280])
    parser.add_argument("--interpret", action="store_true", help="check tiny sizes without a GPU")
    args = parser.parse_args()
    if args.interpret:
        schedules = [Schedule(cluster=n) for n in (1, 2)]
        errors = [check(c, 206, interpret=True, schedule=s) for c in TINY for s in schedules]
        print("RESULT " + json.dumps({"error": max(errors)}))
        return
    claim_gpu()
    for tokens in args.tokens:
        now_ms = best_ms = 0.0
        print("| tokens | linear | now us | one kernel us | TFLOP/s | ratio | error | schedule |")
        print("| --- " * 8 + "|")
        for case in (*FORWARD_CASES, *BACKWARD_CASES):
            now_s = time_calls(case, tokens, matmul.multiply_add)
            best_s, best = min(
                (time_calls(case, tokens, one_kernel(each)), each) for each in SCHEDULES
            )
            error = check(case, tokens, schedule=best)
            flops = 2 * tokens * case.num_in * case.num_out
            way = "forward" if case.forward else "backward"
            cells = (
                *(f"{tokens:,}", f"{case.name}, {way}", f"{1e6 * now_s:.0f}"),
                *(f"{1e6 * best_s:.0f}", f"{flops / best_s / 1e12:.0f}"),
                *(f"{now_s / best_s:.2f}", f"{error:.1e}", " ".join(map(str, best))),
            )
            print("| " + " | ".join(cells) + " |", flush=True)
            now_ms += 30 * case.count * 1e3 * now_s
            best_ms += 30 * case.count * 1e3 * best_s
        saved = {"tokens": tokens, "now_ms": round(now_ms, 2), "one_kernel_ms": round(best_ms, 2)}
        print("RESULT " + json.dumps(saved), flush=True)


def draw(case: Case, tokens: int, *, num_weights: int = 1) -> tuple[list[Any], list[jax.Array]]:
    """Draws (x, row_scale, scale, bias, low, high) and weights; rows are padded as in a step."""
    key = iter(jax.random.split(jax.random.key(0), 8 + num_weights))
    padded = -(-tokens // kernels.ROWS) * kernels.ROWS
    total = case.rank * case.groups
    dtype = FORWARD if case.forward else BACKWARD
    x = jax.random.normal(next(key), (padded, case.num_in)).astype(dtype)
    row_scale = 2.0 ** jax.random.randint(next(key), (padded,), -3, 3).astype(jnp.float32)
    scale = 2.0 ** jax.random.randint(next(key), (case.groups,), -3, 3).astype(jnp.float32)
    bias = jax.random.normal(next(key), (case.num_out,), jnp.bfloat16)
    low = jax.random.normal(next(key), (tokens, total), jnp.bfloat16)
    shape = (case.num_out, case.rank) if case.forward else (total, case.num_out)
    high = jax.random.normal(next(key), shape, jnp.bfloat16)
    weight_shape = (case.num_out, case.num_in)
    weight_shape = weight_shape if case.forward else weight_shape[::-1]
    weights = [
        jax.random.normal(next(key), weight_shape).astype(FORWARD) for _ in range(num_weights)
    ]
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
    low: jax.Array,
    high: jax.Array,
) -> tuple[jax.Array, ...]:
    """Calls it as the train step does, which transposes weights for the backward pass."""
    weight = weight if case.forward else weight.T
    highs = jnp.split(high, case.groups) if case.forward else [high]
    args = (x, weight, row_scale, scale, bias, low, highs)
    return multiply_add(*args, num_rows=tokens, transposed=case.forward)


def one_kernel(
    schedule: Schedule, *, interpret: bool = False
) -> Callable[..., tuple[jax.Array, ...]]:
    """The candidate, for this GPU or interpreted."""
    options: dict[str, Any] = {"schedule": schedule}
    if interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        options |= {"num_cores": 4, "interpret": InterpretGPUParams()}
    else:
        options["num_cores"] = jax.local_devices()[0].core_count
    return partial(hopper_matmul.multiply_add, **options)


def check(case: Case, tokens: int, *, schedule: Schedule, interpret: bool = False) -> float:
    """Returns the largest error, relative to |result| + its size, of all rows."""
    operands, (weight,) = draw(case, tokens)
    multiply_add = one_kernel(schedule, interpret=interpret)
    outs = jax.jit(partial(run, multiply_add, case, tokens))(weight, *operands)
    got = np.concatenate([np.asarray(out, np.float32) for out in outs], axis=1)
    assert got.shape == (tokens, case.num_out)
    x, row_scale, scale, bias, low, high = (
        None if array is None else np.asarray(array, np.float32) for array in operands
    )
    matrix = np.asarray(weight, np.float32)
    wanted = x[:tokens] @ (matrix.T if case.forward else matrix) * row_scale[:tokens, None]
    if case.forward:
        wanted = wanted * np.repeat(scale, case.num_out // case.groups) + bias
        for group, columns in enumerate(np.split(np.arange(case.num_out), case.groups)):
            low_g = low[:, group * case.rank : (group + 1) * case.rank]
            wanted[:, columns] += low_g @ high[columns].T
    else:
        wanted += low @ high
    return float(np.max(np.abs(got - wanted) / (np.abs(wanted) + np.std(wanted))))


def time_calls(case: Case, tokens: int, multiply_add: Callable[..., tuple]) -> float:
    """The median time of a call among several in one program, each with weights of its own."""
    (x, row_scale, *rest), weights = draw(case, tokens, num_weights=NUM_WEIGHTS)
    row_scales = [row_scale * 2.0**n for n in range(NUM_CALLS)]  # no two calls are the same

    @jax.jit
    def run_all(row_scales: list, weights: list, x: jax.Array, *rest: Any) -> list[jax.Array]:
        calls = (
            run(multiply_add, case, tokens, weights[number % NUM_WEIGHTS], x, row_scale, *rest)
            for number, row_scale in enumerate(row_scales)
        )
        return [out[0, 0] for outs in calls for out in outs]

    jax.block_until_ready(run_all(row_scales, weights, x, *rest))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(run_all(row_scales, weights, x, *rest))
        seconds.append((time.perf_counter() - start) / NUM_CALLS)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
