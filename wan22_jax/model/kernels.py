"""Element-wise passes between matmuls, each one GPU kernel: read once, reduce, write once.

XLA splits these chains at every row reduction and reads the activations again for each part. Here
a program holds one row (a token) in registers. Every function has a plain JAX twin of the same
arguments in ``fused.py`` or ``matmul.py`` and is tested against it; ``interpret`` runs it without a
GPU.
Written in Pallas for Triton: rows are independent, so there is nothing to schedule by hand.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from wan22_jax.model.fp8 import BACKWARD, FORWARD, power_of_two_scale
from wan22_jax.model.rope import rotate_pairs

ROWS = 16  # float8 matmuls want a multiple of so many rows: float8 outputs are padded to it
_GELU = (2 / math.pi) ** 0.5
_GELU_EXP2 = -2 * _GELU / math.log(2)  # exp(-2 z) = exp2(-2 z / ln 2)
_TILE_ROWS, _TILE_COLUMNS, _TILE_WARPS = 32, 128, 4  # measured, benchmarks/RESULTS.md


def fits(width: int) -> bool:
    """Whether rows of this width can be cut into vectors of a power of two."""
    return _vector(width) >= 128


def residual_norm(
    x_ND: jax.Array,
    branch_ND: jax.Array | None,
    gate_MD: jax.Array | None,
    weight_MD: jax.Array,
    shift_MD: jax.Array,
    *,
    eps: float,
    dtype: DTypeLike,
    quantize: bool,
    rows: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See ``fused.residual_norm_twin``."""
    N, D = x_ND.shape
    has_branch, has_gate = branch_ND is not None, gate_MD is not None

    def kernel(*arguments: Any) -> None:
        refs = list(arguments)
        x_ref = refs.pop(0)
        branch_ref = refs.pop(0) if has_branch else None
        gate_ref = refs.pop(0) if has_gate else None
        weight_ref, shift_ref = refs.pop(0), refs.pop(0)
        x_out = refs.pop(0) if has_branch else None
        y_out = refs.pop(0) if rows else None
        parts = []
        for at in _spans(D):
            x = _load(x_ref, at)
            if branch_ref is not None:
                branch = _load(branch_ref, at)
                x = x + (branch * _load(gate_ref, at) if gate_ref is not None else branch)
                x = _store(x_out, at, x).astype(jnp.float32)
            parts.append(x)
        mean = _sum(parts) / D
        variance = _sum((x - mean) * (x - mean) for x in parts) / D
        rstd = jax.lax.rsqrt(variance + eps)
        for index, at in enumerate(_spans(D)):
            y = (parts[index] - mean) * rstd * _load(weight_ref, at) + _load(shift_ref, at)
            y = y.astype(dtype) if y_out is None else _store(y_out, at, y)
            parts[index] = y.astype(jnp.float32)
        if quantize:
            _quantize_parts(parts, _spans(D), *refs)

    per_row = [array for array in (x_ND, branch_ND) if array is not None]
    tables = [table for table in (gate_MD, weight_MD, shift_MD) if table is not None]
    outs = [(x_ND.dtype, D)] if has_branch else []
    outs += [(dtype, D)] * rows + ([(FORWARD, D), (jnp.float32, 0)] if quantize else [])
    return _call_by_row(kernel, N, per_row, tables, outs, name="residual_norm", interpret=interpret)


def residual_norm_backward(
    x_ND: jax.Array,
    dy_ND: jax.Array,
    dx_ND: jax.Array | None,
    gate_MD: jax.Array | None,
    weight_MD: jax.Array,
    *,
    eps: float,
    dtype: DTypeLike | None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """The gradient of ``fused.residual_norm_twin``; ``dtype`` is the branch's, None without one.

    That of a branch in x's dtype and without a gate is that of x.
    """
    N, D = x_ND.shape
    has_dx, has_gate = dx_ND is not None, gate_MD is not None
    has_branch = dtype is not None and (has_gate or dtype != x_ND.dtype)

    def kernel(*arguments: Any) -> None:
        refs = list(arguments)
        x_ref, dy_ref = refs.pop(0), refs.pop(0)
        dx_ref = refs.pop(0) if has_dx else None
        gate_ref = refs.pop(0) if has_gate else None
        weight_ref, dx_out = refs.pop(0), refs.pop(0)
        spans = _spans(D)
        parts = [_load(x_ref, at) for at in spans]
        mean = _sum(parts) / D
        parts = [x - mean for x in parts]
        rstd = _rstd(parts, D, eps)
        parts = [x * rstd for x in parts]
        grads = [_load(dy_ref, at) * _load(weight_ref, at) for at in spans]
        mean_grad = _sum(grads) / D
        mean_product = _sum(map(operator.mul, grads, parts)) / D
        for at, x, grad in zip(spans, parts, grads, strict=True):
            dx = rstd * (grad - mean_grad - x * mean_product)
            if dx_ref is not None:
                dx = dx + _load(dx_ref, at)
            _store(dx_out, at, dx)
            if has_branch:
                _store(refs[0], at, dx * _load(gate_ref, at) if gate_ref is not None else dx)

    per_row = [array for array in (x_ND, dy_ND, dx_ND) if array is not None]
    tables = [table for table in (gate_MD, weight_MD) if table is not None]
    outs: list[tuple[DTypeLike, int]] = [(x_ND.dtype, D)]
    if has_branch and dtype is not None:
        outs.append((dtype, D))
    dx = _call_by_row(
        kernel, N, per_row, tables, outs, name="residual_norm_backward", interpret=interpret
    )
    return dx if dtype is None else (dx[0], dx[-1])


def norm_rope(
    x_ND: jax.Array,
    weight_D: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    *,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """See ``fused.norm_rope_twin``."""
    N, D = x_ND.shape

    def kernel(x_ref: Any, weight_ref: Any, *rest: Any) -> None:
        *tables, out_ref = rest
        parts = [_load(x_ref, at) for at in _spans(D)]
        rstd = _rstd(parts, D, eps)
        for at, x in zip(_spans(D), parts, strict=True):
            y = (x * rstd).astype(x_ND.dtype).astype(jnp.float32)
            y = (y * _load(weight_ref, at)).astype(x_ND.dtype).astype(jnp.float32)
            if tables:
                cos, sin = _load_angles(tables, at)
                y = _join_pairs(*rotate_pairs(*_split_pairs(y), cos, sin))
            _store(out_ref, at, y)

    per_row, tables = [x_ND], [weight_D[None]]
    outs = [(x_ND.dtype, D)]
    return _call_by_row(
        kernel, N, per_row, tables, outs, cycled=rope or (), name="norm_rope", interpret=interpret
    )[0]


def norm_rope_backward(
    x_ND: jax.Array,
    dy_ND: jax.Array,
    weight_D: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    *,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """The gradient of ``fused.norm_rope_twin`` by x."""
    N, D = x_ND.shape

    def kernel(x_ref: Any, dy_ref: Any, weight_ref: Any, *rest: Any) -> None:
        *tables, out_ref = rest
        spans = _spans(D)
        parts = [_load(x_ref, at) for at in spans]
        rstd = _rstd(parts, D, eps)
        parts = [x * rstd for x in parts]
        grads = []
        for at in spans:
            dy = _load(dy_ref, at)
            if tables:
                cos, sin = _load_angles(tables, at)
                dy = _join_pairs(*rotate_pairs(*_split_pairs(dy), cos, -sin))
            grads.append(dy * _load(weight_ref, at))
        mean_product = _sum(map(operator.mul, grads, parts)) / D
        for at, x, grad in zip(spans, parts, grads, strict=True):
            _store(out_ref, at, rstd * (grad - x * mean_product))

    per_row, tables = [x_ND, dy_ND], [weight_D[None]]
    outs = [(x_ND.dtype, D)]
    return _call_by_row(
        kernel,
        N,
        per_row,
        tables,
        outs,
        cycled=rope or (),
        name="norm_rope_backward",
        interpret=interpret,
    )[0]


def quantize_rows(
    parts: Sequence[jax.Array],
    scale_G: jax.Array | None,
    *,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See ``fused.quantize_rows_twin``."""
    N = parts[0].shape[0]
    widths = [part.shape[1] for part in parts]
    total = sum(widths)

    def kernel(*arguments: Any) -> None:
        refs = list(arguments)
        x_refs = [refs.pop(0) for _ in widths]
        scale_ref = refs.pop(0) if scale_G is not None else None
        values, spans, start = [], [], 0
        for group, (x_ref, width) in enumerate(zip(x_refs, widths, strict=True)):
            for at in _spans(width):
                spans.append(pl.ds(start + at.start, at.size))
                x = _load(x_ref, at)
                values.append(x if scale_ref is None else x * scale_ref[pl.ds(group, 1)])
            start += width
        _quantize_parts(values, spans, *refs, dtype=dtype)

    tables = [scale_G[None]] if scale_G is not None else []
    outs = [(dtype, total), (jnp.float32, 0)]
    out, scale = _call_by_row(
        kernel, N, parts, tables, outs, name="quantize_rows", interpret=interpret
    )
    return out, scale


def gelu_quantize(
    x_NF: jax.Array, *, quantize: bool, rows: bool = True, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """See ``fused.gelu_twin``."""
    N, F = x_NF.shape

    def kernel(x_ref: Any, *refs: Any) -> None:
        y_ref, quantized = (refs[0], refs[1:]) if rows else (None, refs)
        parts = []
        for at in _spans(F):
            y, _ = _gelu(_load(x_ref, at))
            y = y.astype(x_NF.dtype) if y_ref is None else _store(y_ref, at, y)
            parts.append(y.astype(jnp.float32))
        if quantize:
            _quantize_parts(parts, _spans(F), *quantized)

    outs = [(x_NF.dtype, F)] * rows + ([(FORWARD, F), (jnp.float32, 0)] if quantize else [])
    return _call_by_row(kernel, N, [x_NF], [], outs, name="gelu_quantize", interpret=interpret)


def gelu_backward(
    x_NF: jax.Array, dy_NF: jax.Array, scale_1: jax.Array | None, *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """See ``fused.gelu_backward_twin``."""
    N, F = x_NF.shape

    def kernel(x_ref: Any, dy_ref: Any, *arguments: Any) -> None:
        refs = list(arguments)
        scale_ref = refs.pop(0) if scale_1 is not None else None
        y_out, dx_out = refs.pop(0), refs.pop(0)
        parts = []
        for at in _spans(F):
            y, slope = _gelu(_load(x_ref, at))
            _store(y_out, at, y)
            dx = _store(dx_out, at, _load(dy_ref, at) * slope).astype(jnp.float32)
            parts.append(dx if scale_ref is None else dx * scale_ref[...])
        if scale_ref is not None:
            _quantize_parts(parts, _spans(F), *refs, dtype=BACKWARD)

    tables = [] if scale_1 is None else [scale_1[None]]
    outs = [(x_NF.dtype, F), (x_NF.dtype, F)]
    outs += [] if scale_1 is None else [(BACKWARD, F), (jnp.float32, 0)]
    return _call_by_row(
        kernel,
        N,
        [x_NF, dy_NF],
        tables,
        outs,
        in_place=2,
        num_warps=16,
        name="gelu_backward",
        interpret=interpret,
    )


def scale_add_low_rank(
    raw_NC: jax.Array,
    row_scale_N: jax.Array | None,
    scale_G: jax.Array | None,
    bias_C: jax.Array | None,
    low_NR: jax.Array | None,
    high: jax.Array | None,
    *,
    num_rows: int,
    columns: slice,
    transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    """See ``matmul.scale_add_low_rank_twin``."""
    width = columns.stop - columns.start
    tile = min(_TILE_COLUMNS, _vector(width))
    first, group = columns.start // tile, columns.start // width
    specs, arrays = [pl.BlockSpec((_TILE_ROWS, tile), lambda i, j: (i, j + first))], [raw_NC]
    if row_scale_N is not None:
        specs.append(pl.BlockSpec((_TILE_ROWS,), lambda i, j: (i,)))  # noqa: ARG005
        arrays.append(row_scale_N)
    if scale_G is not None:
        specs.append(pl.BlockSpec((1,), lambda i, j: (group,)))  # noqa: ARG005
        arrays.append(scale_G)
    if bias_C is not None:
        specs.append(pl.BlockSpec((tile,), lambda i, j: (j + first,)))  # noqa: ARG005
        arrays.append(bias_C)
    rank = depth = 0
    if low_NR is not None and high is not None:
        rank = high.shape[1 if transposed else 0]
        if pad := -rank % 16:  # the least depth of a matmul
            high = jnp.pad(high, ((0, 0), (0, pad)) if transposed else ((0, pad), (0, 0)))
            low_NGR = low_NR.reshape(low_NR.shape[0], -1, rank)
            low_NR = jnp.pad(low_NGR, ((0, 0), (0, 0), (0, pad))).reshape(low_NR.shape[0], -1)
            rank += pad
        depth = min(rank & -rank, 64)
        specs.append(pl.BlockSpec((_TILE_ROWS, rank), lambda i, j: (i, group)))  # noqa: ARG005
        shape = (tile, rank) if transposed else (rank, tile)
        specs.append(
            pl.BlockSpec(shape, (lambda i, j: (j, 0)) if transposed else (lambda i, j: (0, j)))  # noqa: ARG005
        )
        arrays += [low_NR, high]

    def kernel(raw_ref: Any, *arguments: Any) -> None:
        refs = list(arguments)
        rows = pl.program_id(0) * _TILE_ROWS + jnp.arange(_TILE_ROWS)
        inside = rows < num_rows
        mask = jnp.broadcast_to(inside[:, None], (_TILE_ROWS, tile))
        out = plgpu.load(raw_ref.at[:, :], mask=mask, other=0).astype(jnp.float32)
        row_scale = None
        if row_scale_N is not None:
            row_scale = plgpu.load(refs.pop(0).at[:], mask=inside, other=1)[:, None]
        if scale_G is not None:
            out = out * refs.pop(0)[...][None, :]
        bias = refs.pop(0)[:][None, :].astype(jnp.float32) if bias_C is not None else None
        if rank:
            low_ref, high_ref = refs.pop(0), refs.pop(0)
            parts = []
            for start in range(0, rank, depth):
                at = pl.ds(start, depth)
                low_mask = jnp.broadcast_to(inside[:, None], (_TILE_ROWS, depth))
                low = plgpu.load(low_ref.at[:, at], mask=low_mask, other=0)
                high = (high_ref[:, at] if transposed else high_ref[at, :]).astype(low.dtype)
                parts.append(plgpu.dot(low, high, trans_b=transposed))
            product = functools.reduce(operator.add, parts)
            # Scaled twice, exactly, lest Triton starts the sum from raw, in the matmul's layout.
            out = out + (product if row_scale is None else product * (1 / row_scale))
        out = out if row_scale is None else out * row_scale
        out = out if bias is None else out + bias
        plgpu.store(refs[0].at[:, :], out.astype(refs[0].dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16),
        grid=(pl.cdiv(num_rows, _TILE_ROWS), width // tile),
        in_specs=specs,
        out_specs=pl.BlockSpec((_TILE_ROWS, tile), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=_TILE_WARPS, num_stages=1),
        interpret=interpret,
        name="scale_add_low_rank",
    )(*arrays)


def _call_by_row(
    kernel: Callable[..., None],
    num_rows: int,
    per_row: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    outs: Sequence[tuple[DTypeLike, int]],
    *,
    cycled: Sequence[jax.Array] = (),
    in_place: int = 0,
    num_warps: int | None = None,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs one program a row.

    A table [M, D] holds a row for num_rows / M rows in turn, a cycled one is read over and over.
    Outputs are (dtype, width), width 0 for one number a row; float8 outputs and the numbers beside
    them are padded to ROWS with rows that nobody writes. The first ``in_place`` of ``per_row`` give
    their memory to the first outputs: a program must have read its row before it writes there.
    """
    pads = any(dtype in (FORWARD, BACKWARD) for dtype, _ in outs)
    padded = -(-num_rows // ROWS) * ROWS if pads else num_rows
    specs = [pl.BlockSpec((None, array.shape[1]), lambda i: (i, 0)) for array in per_row]
    for array in tables:
        repeats = num_rows // array.shape[0]
        specs.append(pl.BlockSpec((None, array.shape[1]), lambda i, n=repeats: (i // n, 0)))
    for array in cycled:
        length = array.shape[0]
        specs.append(pl.BlockSpec((None, array.shape[1]), lambda i, n=length: (i % n, 0)))
    shapes, out_specs = [], []
    for dtype, width in outs:
        if width == 0:
            shapes.append(jax.ShapeDtypeStruct((padded,), dtype))
            out_specs.append(pl.BlockSpec((1,), lambda i: (i,)))
        else:
            length = padded if dtype in (FORWARD, BACKWARD) else num_rows
            shapes.append(jax.ShapeDtypeStruct((length, width), dtype))
            out_specs.append(pl.BlockSpec((None, width), lambda i: (i, 0)))
    num_warps = num_warps or (8 if max(width for _, width in outs) > 4096 else 4)
    results = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(num_rows,),
        in_specs=specs,
        out_specs=out_specs,
        input_output_aliases={index: index for index in range(in_place)},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*per_row, *tables, *cycled)
    return tuple(results)


def _vector(width: int) -> int:
    return min(width & -width, 2048 if width > 4096 else 1024)


def _spans(width: int) -> list[Any]:
    size = _vector(width)
    return [pl.ds(start, size) for start in range(0, width, size)]


def _load(ref: Any, at: Any) -> jax.Array:
    return plgpu.load(ref.at[at]).astype(jnp.float32)


def _store(ref: Any, at: Any, value: jax.Array) -> jax.Array:
    value = value.astype(ref.dtype)
    plgpu.store(ref.at[at], value)
    return value


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    # Added up first, so that a program's warps wait for each other once and not once a part.
    return jnp.sum(functools.reduce(operator.add, parts))


def _rstd(parts: Sequence[jax.Array], width: int, eps: float) -> jax.Array:
    return jax.lax.rsqrt(_sum(x * x for x in parts) / width + eps)


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tanh approximation of GELU and its derivative; exp2 is one instruction, exp is ten."""
    square = x * x
    half = 1 / (1 + jnp.exp2(x * (_GELU_EXP2 + 0.044715 * _GELU_EXP2 * square)))
    y = x * half
    return y, half + y * (1 - half) * (2 * _GELU + 6 * 0.044715 * _GELU * square)


def _load_angles(tables: Sequence[Any], at: Any) -> list[jax.Array]:
    """Cosine and sine of each pair of channels; all heads rotate alike."""
    pair = at.start // 2 + jnp.arange(at.size // 2)
    # Not %, whose care for signs hides from Triton that neighbours are loaded.
    return [plgpu.load(ref.at[jax.lax.rem(pair, ref.shape[-1])]) for ref in tables]


def _split_pairs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd channels; a thread holds neighbours, so that nothing moves."""
    even, odd = jax.lax.split(x.reshape(-1, 2), (1, 1), axis=1)
    return even.reshape(-1), odd.reshape(-1)


def _join_pairs(even: jax.Array, odd: jax.Array) -> jax.Array:
    return jnp.stack([even, odd], axis=1).reshape(-1)


def _quantize_parts(
    parts: Sequence[jax.Array],
    spans: Sequence[Any],
    out_ref: Any,
    scale_ref: Any,
    dtype: DTypeLike = FORWARD,
) -> None:
    amax = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, parts)))
    scale = power_of_two_scale(amax, dtype)
    scale_ref[...] = jnp.full((1,), scale)
    for x, at in zip(parts, spans, strict=True):
        _store(out_ref, at, x * (1 / scale))
