"""How does a network get into an Orbax checkpoint, tensor by tensor, and what does it hash to?

One layer of one tensor is read, cast, hashed and written before the next. A float8 weight is
quantised on the way; its scale is written beside it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from wan22_jax.model.fp8 import is_float8
from wan22_jax.model_folder import NETWORKS, open_array, quantise_layer
from wan22_jax.weights import OfficialTensors, is_stacked, official_names, scale_of

_WORKERS = 2  # each holds two copies of the tensor it is copying
_CHUNK_BYTES = 2**27  # a larger tensor (the token embedding) is cut by rows

Plan = Mapping[str, jax.ShapeDtypeStruct]  # by parameter path, layers stacked


def write_network(
    tensors: OfficialTensors,
    plan: Plan,
    path: Path,
    bar: tqdm,
    *,
    done: Mapping[str, Sequence[str]] | None = None,
    note: Callable[[str, list[str]], None] | None = None,
) -> list[str]:
    """Writes one Orbax checkpoint; returns a line with name, dtype, shape and hash per tensor.

    Args:
        tensors: of the network.
        plan: shapes and dtypes by parameter path.
        path: of the checkpoint; a folder that is there already is gone on with.
        bar: told of the bytes that are written.
        done: lines of tensors that should be there; they are, if they still have these hashes.
        note: told of each tensor that is written, by official name, with its lines.
    """
    if not path.is_dir():
        _reserve(path, plan)
    parts, done = _open_parts(path, plan), done or {}

    def copy(tensors: OfficialTensors, parts: _Parts, name: str) -> tuple[str, list[str]]:
        lines = [_describe_stored(key, parts[key]) for key in _keys(parts, name) if name in done]
        if not lines or lines != done[name]:
            lines = _copy_tensor(tensors, parts, name)
        return name, lines

    written = []
    for name, lines in _run(copy, tensors, parts, bar):
        written += lines
        if note:
            note(name, lines)
    _wait_for_disk(path)
    return sorted(written)


def compare_network(
    tensors: OfficialTensors, plan: Plan, path: Path, bar: tqdm
) -> Generator[str | None, None, None]:
    """Reads a checkpoint that ``write_network`` wrote; says of each tensor which part differs."""
    yield from _run(_compare_tensor, tensors, _open_parts(path, plan), bar)


def digest_network(config: Any, lines: Sequence[str]) -> str:
    """Hashes a network: its config, a dataclass, and what ``write_network`` says of it."""
    return _digest([json.dumps(asdict(config), sort_keys=True), *lines])


def digest_networks(digests: Mapping[str, str]) -> str:
    """Hashes a model by the digests of its networks."""
    return _digest([digests[network] for network in NETWORKS])


_Parts = Mapping[str, ts.TensorStore]  # by official name; a scale is a part too


def _open_parts(path: Path, plan: Plan) -> dict[str, ts.TensorStore]:
    parts: dict[str, ts.TensorStore] = {}
    for stacked_name, leaf in plan.items():
        array = open_array(path.absolute() / stacked_name, sync=False)
        for layer, name in enumerate(official_names(stacked_name, leaf.shape)):
            parts[name] = array[layer] if is_stacked(stacked_name) else array
    return parts


def _keys(parts: _Parts, name: str) -> list[str]:
    """A float8 weight is two parts, the second is its scale."""
    return [name, scale_of(name)] if is_float8(parts[name].dtype.numpy_dtype) else [name]


_Result = TypeVar("_Result")


def _run(
    task: Callable[[OfficialTensors, _Parts, str], _Result],
    tensors: OfficialTensors,
    parts: _Parts,
    bar: tqdm,
) -> Iterator[_Result]:
    """Does a task for every tensor of the source, a few at a time; results come in order."""
    names = [name for name in parts if name in tensors.stored_names]  # a scale has no source
    with ThreadPoolExecutor(_WORKERS) as workers:
        tasks = [workers.submit(task, tensors, parts, name) for name in names]
        try:
            for name, future in zip(names, tasks, strict=True):
                yield future.result()
                bar.update(sum(_part_bytes(parts[key]) for key in _keys(parts, name)))
        finally:
            workers.shutdown(cancel_futures=True)


def _copy_tensor(tensors: OfficialTensors, parts: _Parts, name: str) -> list[str]:
    lines = []
    for key, part, blocks in _make_blocks(tensors, parts, name):
        digest = hashlib.sha256()
        for rows, block in blocks:
            writing = part[rows].write(block)
            digest.update(block.reshape(-1).view(np.uint8).data)
            writing.result()
        lines.append(_describe(key, part, digest.hexdigest()))
    return lines


def _compare_tensor(tensors: OfficialTensors, parts: _Parts, name: str) -> str | None:
    """Returns the name of the first part that is not what the source makes of it."""
    for key, part, blocks in _make_blocks(tensors, parts, name):
        for rows, block in blocks:
            stored = part[rows].read().result()
            if stored.dtype != block.dtype or stored.tobytes() != block.tobytes():
                return key
    return None


def _make_blocks(
    tensors: OfficialTensors, parts: _Parts, name: str
) -> Iterator[tuple[str, ts.TensorStore, Iterable[tuple[Any, np.ndarray]]]]:
    """Makes what is to be stored of a tensor: for each of its parts, blocks with their rows."""
    if len(keys := _keys(parts, name)) == 1:
        part = parts[name]
        dtype = part.dtype.numpy_dtype
        yield (
            name,
            part,
            (
                (rows, np.ascontiguousarray(tensors.read(name, rows, dtype=dtype)))
                for rows in _chunks(part)
            ),
        )
        return
    for key, block in zip(keys, quantise_layer(tensors.read(name)), strict=True):
        yield key, parts[key], [(..., np.asarray(block))]


def _wait_for_disk(path: Path) -> None:
    for file in path.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _describe_stored(name: str, part: ts.TensorStore) -> str:
    digest = hashlib.sha256()
    for rows in _chunks(part):
        block = np.ascontiguousarray(part[rows].read().result())
        digest.update(block.reshape(-1).view(np.uint8).data)
    return _describe(name, part, digest.hexdigest())


def _describe(name: str, part: ts.TensorStore, digest: str) -> str:
    return f"{name} {part.dtype.numpy_dtype} {list(part.shape)} {digest}"


def _chunks(part: ts.TensorStore) -> list[Any]:
    """The rows of each chunk that a part is stored in."""
    if not part.shape:
        return [...]
    step = part.chunk_layout.read_chunk_template.shape[0]
    return [slice(i, min(i + step, part.shape[0])) for i in range(0, part.shape[0], step)]


def _reserve(path: Path, plan: Plan) -> None:
    """Lets Orbax write a checkpoint of arrays that have no data yet.

    The arrays are plain zarr, uncompressed, with one chunk a layer: to be filled layer by layer,
    and restored by Orbax as if it had written them.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _EmptyArrays(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where there is none
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=registry
    )
    shapes = {  # a zero seen through strides of 0 takes no memory
        name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in plan.items()
    }
    chunks = {
        name: ocp.SaveArgs(shard_axes=(0,))
        if is_stacked(name)
        else ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        for name in plan
    }
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, ocp.args.PyTreeSave(shapes, save_args=chunks))


class _EmptyArrays(ocp.type_handlers.NumpyHandler):
    """Creates arrays as NumpyHandler does, and leaves them empty."""

    async def _open_and_write(
        self,
        value: np.ndarray,  # noqa: ARG002
        tspec: dict[str, Any],
        ts_context: ts.Context,
    ) -> None:
        await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _part_bytes(part: ts.TensorStore) -> int:
    return math.prod(part.shape) * part.dtype.numpy_dtype.itemsize
