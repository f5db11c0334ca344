"""A float8 matmul that adds scales, bias and an adapter before it writes: on Hopper, one kernel.

Elsewhere cuBLAS writes x W^T and ``scale_add_low_rank`` reads it, scales it, adds bias and low B^T
and writes it again. Here the adapter's product is one more step of the sum in the accumulators.

A block (two warpgroups that multiply, one that loads) makes tiles of 128 rows and 256 columns, one
after another; the loads of the next tile go on while this one is finished. Two neighbouring blocks
share each tile of the weight, so that level 2 cache is read a third less.

Written in Pallas for Mosaic GPU, whose kernels take a second or two to compile: calls of the same
shapes share one. ``benchmarks/time_matmul.py`` measures it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

ROWS, COLUMNS, DEPTH_BYTES = 128, 256, 128  # of a tile; depth of one step
WARPGROUPS = 2  # that multiply, each its half of the rows
OUT_COLUMNS = 64  # stored at once


class Schedule(NamedTuple):
    """What may be tuned; the result does not depend on it."""

    stages: int = 4  # steps that are loaded ahead
    cluster: int = 2  # blocks that share the tiles of the weight
    band: int = 8  # column tiles that are gone through together


DEFAULT = Schedule()


@functools.cache
def count_cores(platform: str) -> int:
    """The multiprocessors of the first device, 0 where this kernel does not run."""
    device = jax.local_devices()[0]
    is_hopper = platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"
    return device.core_count if is_hopper and jax.__version_info__ >= (0, 11) else 0


def fits(
    x_NI: jax.Array,
    weight_OI: jax.Array,
    low_NR: jax.Array | None,
    *,
    groups: int,
    num_cores: int,
) -> bool:
    """Whether ``multiply_add`` takes these, and makes a tile for each multiprocessor at least.

    With fewer tiles, smaller ones are better, which cuBLAS has.
    """
    num_out, depth = weight_OI.shape
    if low_NR is not None:
        rank = low_NR.shape[1] // groups
        if low_NR.dtype != jnp.bfloat16 or rank == 0 or rank % 16:
            return False
    is_float8 = x_NI.dtype.itemsize == weight_OI.dtype.itemsize == 1
    is_whole = num_out // groups % COLUMNS == 0 and depth % DEPTH_BYTES == 0
    num_tiles = pl.cdiv(x_NI.shape[0], ROWS) * num_out // COLUMNS
    return is_float8 and is_whole and num_tiles >= num_cores


@functools.partial(
    jax.jit, static_argnames=("num_rows", "transposed", "num_cores", "schedule", "interpret")
)
def multiply_add(
    x_NI: jax.Array,
    weight_OI: jax.Array,
    row_scale_N: jax.Array,
    scale_G: jax.Array | None,
    bias_O: jax.Array | None,
    low_NR: jax.Array | None,
    highs: Sequence[jax.Array | None],
    *,
    num_rows: int,
    transposed: bool,
    num_cores: int,
    schedule: Schedule = DEFAULT,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """See ``matmul.multiply_add``, for what ``fits``; scales are powers of two.

    Jitted so that calls of the same shapes are traced, lowered and compiled once. Beside the
    arguments of that it takes the number of multiprocessors and what may be tuned; ``interpret``
    are parameters of Pallas' interpret mode.
    """
    groups = len(highs)
    width, depth = weight_OI.shape[0] // groups, weight_OI.shape[1]
    stages, cluster, band = schedule
    num_steps = depth // DEPTH_BYTES
    # Of tiles of a cluster.
    grid = (pl.cdiv(num_rows, ROWS * cluster), weight_OI.shape[0] // COLUMNS)
    num_clusters = num_cores // cluster
    given = {"x": x_NI, "weight": weight_OI, "row_scale": row_scale_N}
    given |= {} if scale_G is None else {"scale": scale_G}
    given |= {} if bias_O is None else {"bias": bias_O}
    extras = {"row_scale": ROWS} | ({} if bias_O is None else {"bias": COLUMNS})  # once a tile

    def operand(length: int, dtype: DTypeLike) -> Any:
        transforms = _swizzled(DEPTH_BYTES, dtype)
        return plgpu.SMEM((stages, length, DEPTH_BYTES), dtype, transforms=transforms)

    x_space, w_space = operand(ROWS, x_NI.dtype), operand(COLUMNS, weight_OI.dtype)
    rank = num_parts = part = 0
    if low_NR is not None:
        rank = low_NR.shape[1] // groups
        part = min(64, rank & -rank)  # of the rank, in one step
        num_parts = rank // part
        # Tiles are loaded eight rows at a time: rows are padded as those of x.
        given["low"] = jnp.pad(low_NR, ((0, x_NI.shape[0] - num_rows), (0, 0)))
        # A step's operands, or those of the adapter in their place: both have equal strides.
        fold, swizzled = 64 // part, _swizzled(part, jnp.bfloat16)
        high_shape = (COLUMNS, part) if transposed else (part, COLUMNS)
        x_space, w_space = (
            plgpu.RefUnion(
                space, plgpu.SMEM((stages, fold, *shape), jnp.bfloat16, transforms=swizzled)
            )
            for space, shape in ((x_space, (ROWS, part)), (w_space, high_shape))
        )

    scratch: dict[str, Any] = {
        "x_smem": x_space,
        "w_smem": w_space,
        "extra_smem": [plgpu.SMEM((size,), given[name].dtype) for name, size in extras.items()],
        "out_smem": plgpu.SMEM(
            (WARPGROUPS, 2, ROWS // WARPGROUPS, OUT_COLUMNS),
            jnp.bfloat16,
            transforms=(plgpu.SwizzleTransform(128),),
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": _barrier(cluster, num_barriers=stages),
        "extras_full": plgpu.Barrier(num_arrivals=len(extras)),
        "extras_free": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }

    def matmul_add(*refs: Any, x_smem: Any, w_smem: Any, **scratch: Any) -> None:
        inputs = dict(zip(given, refs, strict=False))
        high_refs, outputs = refs[len(given) : -groups], refs[-groups:]
        low_smem: Any = None
        high_smem: Any = None
        if num_parts:
            (x_smem, low_smem), (w_smem, high_smem) = x_smem, w_smem
        full, free = scratch["full"], scratch["free"]
        extras_full, extras_free = scratch["extras_full"], scratch["extras_free"]
        out_smem = scratch["out_smem"]
        extra_smem = dict(zip(extras, scratch["extra_smem"], strict=True))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        first = lax.axis_index("cluster")
        num_tiles = lax.div(grid[0] * grid[1] - first + num_clusters - 1, jnp.int32(num_clusters))

        def place(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            row, column = plgpu.planar_snake(first + tile * num_clusters, grid, 1, band)
            return (row * cluster + block) * ROWS, column * COLUMNS

        def slot_of(count: jax.Array) -> jax.Array:
            return lax.rem(count, jnp.int32(stages))

        @pl.when(warpgroup == WARPGROUPS)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            share: dict[str, Any] = {"collective_axes": ("block",)} if cluster > 1 else {}

            def wait_for(slot: jax.Array, count: jax.Array) -> None:
                @pl.when(count >= stages)
                def _wait() -> None:
                    plgpu.barrier_wait(free.at[slot])

            def load_tile(tile: jax.Array, count: jax.Array) -> jax.Array:
                row, column = place(tile)
                group = lax.div(column, jnp.int32(width))
                rows, columns = pl.ds(row, ROWS), pl.ds(column, COLUMNS)
                of_group = pl.ds(column - group * width, COLUMNS)

                def load_step(k: jax.Array, _: None) -> None:
                    slot = slot_of(count + k)
                    at = pl.ds(k * DEPTH_BYTES, DEPTH_BYTES)
                    weight = inputs["weight"].at[columns, at]
                    wait_for(slot, count + k)
                    plgpu.copy_gmem_to_smem(
                        inputs["x"].at[rows, at], x_smem.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(weight, w_smem.at[slot], full.at[slot], **share)

                def load_part(index: int) -> None:
                    slot = slot_of(count + num_steps + index)
                    low = inputs["low"].at[rows, pl.ds(group * rank + index * part, part)]
                    at = pl.ds(index * part, part)
                    wait_for(slot, count + num_steps + index)
                    plgpu.copy_gmem_to_smem(low, low_smem.at[slot, 0], full.at[slot])
                    for number, high in enumerate(high_refs):

                        @pl.when(group == number)
                        def _copy(high: Any = high) -> None:
                            source = high.at[(of_group, at) if transposed else (at, of_group)]
                            target = high_smem.at[slot, 0]
                            plgpu.copy_gmem_to_smem(source, target, full.at[slot], **share)

                lax.fori_loop(0, num_steps, load_step, None)

                @pl.when(tile > 0)
                def _wait() -> None:
                    plgpu.barrier_wait(extras_free)

                for name, span in (("row_scale", rows), ("bias", columns)):
                    if name in extras:
                        source = inputs[name].at[span]
                        plgpu.copy_gmem_to_smem(source, extra_smem[name], extras_full)
                for index in range(num_parts):
                    load_part(index)
                return count + num_steps + num_parts

            count = lax.fori_loop(0, num_tiles, load_tile, jnp.int32(0))
            # Every arrival is waited for, lest one comes from the other block after this has ended.

            def drain(count: jax.Array, _: None) -> None:
                plgpu.barrier_wait(free.at[slot_of(count)])

            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

            @pl.when(num_tiles > 0)
            def _wait() -> None:
                plgpu.barrier_wait(extras_free)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            height = ROWS // WARPGROUPS
            mine = pl.ds(warpgroup * height, height)

            def multiply_tile(tile: jax.Array, count: jax.Array) -> jax.Array:
                row, column = place(tile)
                group = lax.div(column, jnp.int32(width))

                def read_scale(shape: tuple[int, ...]) -> jax.Array:
                    scale = _read(extra_smem["row_scale"].at[mine], plgpu.Layout.WGMMA.reduce(1))
                    scale = scale if scale_G is None else scale * inputs["scale"][group]
                    return lax.broadcast_in_dim(scale, shape, [0])

                def multiply(sum_ref: Any) -> jax.Array:
                    def multiply_step(k: jax.Array, sum_ref: Any) -> Any:
                        slot = slot_of(count + k)
                        plgpu.barrier_wait(full.at[slot])
                        weight = w_smem.at[slot].transpose((1, 0))
                        plgpu.wgmma(sum_ref, x_smem.at[slot, mine], weight)
                        plgpu.wgmma_wait(1)  # for the step before

                        @pl.when(k > 0)
                        def _release() -> None:
                            plgpu.barrier_arrive(free.at[slot_of(count + k - 1)])

                        return sum_ref

                    lax.fori_loop(0, num_steps, multiply_step, sum_ref)
                    plgpu.barrier_wait(extras_full)
                    for index in range(num_parts):
                        slot = slot_of(count + num_steps + index)
                        plgpu.barrier_wait(full.at[slot])
                        # The whole sum is multiplied with the scales, which are powers of two.
                        low_ref = low_smem.at[slot, 0, mine]
                        low = _read(low_ref, plgpu.Layout.WGMMA).astype(jnp.float32)
                        low_ref[...] = (low / read_scale(low.shape)).astype(jnp.bfloat16)
                        plgpu.commit_smem()
                        high = high_smem.at[slot, 0]
                        high = high.transpose((1, 0)) if transposed else high
                        plgpu.wgmma(sum_ref, low_ref, high)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(free.at[slot_of(count + num_steps + index - 1)])
                    plgpu.wgmma_wait(0)
                    last = count + num_steps + num_parts - 1
                    plgpu.barrier_arrive(free.at[slot_of(last)])
                    return sum_ref[...]

                sums = pl.run_scoped(multiply, _accumulators((height, COLUMNS)))
                sums = sums * read_scale(sums.shape)

                def store(start: int) -> None:
                    out = sums[:, start : start + OUT_COLUMNS]
                    if bias_O is not None:
                        at = extra_smem["bias"].at[pl.ds(start, OUT_COLUMNS)]
                        bias = _read(at, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                        out = out + lax.broadcast_in_dim(bias, out.shape, [1])
                    staged = out_smem.at[warpgroup, (start // OUT_COLUMNS) % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    staged[...] = out.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    rows = pl.ds(row + warpgroup * height, height)
                    columns = pl.ds(column - group * width + start, OUT_COLUMNS)
                    for index, output in enumerate(outputs):

                        @pl.when(group == index)
                        def _copy(output: Any = output) -> None:
                            plgpu.copy_smem_to_gmem(staged, output.at[rows, columns])

                for start in range(0, COLUMNS, OUT_COLUMNS):
                    store(start)
                plgpu.barrier_arrive(extras_free)
                return count + num_steps + num_parts

            lax.fori_loop(0, num_tiles, multiply_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    outs = plgpu.kernel(
        matmul_add,
        out_type=[jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16)] * groups,
        scratch_types=scratch,
        grid=(num_clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )(*given.values(), *([] if low_NR is None else highs))
    return tuple(outs)


def _swizzled(width: int, dtype: DTypeLike) -> tuple:
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def _accumulators(shape: tuple[int, int]) -> Any:
    return plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def _barrier(cluster: int, **options: Any) -> Any:
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=WARPGROUPS, **options)
    return plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=WARPGROUPS, **options)


def _read(ref: Any, layout: Any) -> jax.Array:
    # In jax 0.10, for which this is not, it has another signature.
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]
