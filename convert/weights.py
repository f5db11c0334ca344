"""``wan22-convert``: a PyTorch model folder becomes a model folder of this project.

Weights are streamed: one layer of one tensor is read, cast, hashed and written before the next, so
host memory stays far below the size of a network. ``--dtype`` is that of the transformer (but for
what always stays float32) and of the text encoder; the VAE stays float32, in which the original
runs it. ``float8`` is a bfloat16 model whose transformer has the linears of its blocks in eight
bits, quantised from the checkpoint's own numbers. Everything is written into ``<out>.partial``,
which becomes ``<out>`` once complete; the same command goes on with one that was left behind.
``--verify`` compares every tensor with the source, of an ``<out>`` that is there already or of
the one just written.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial as partial_function
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from flax import nnx
from tqdm import tqdm

from convert.checkpoints import Checkpoint, Sources, open_checkpoint
from convert.progress import Progress, identify, open_progress, used_bytes
from wan22_jax.errors import BadInput, is_full_disk, run_command
from wan22_jax.model.fp8 import is_float8
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model.vae import WanVAE
from wan22_jax.model_folder import (
    FLOAT8,
    NETWORKS,
    ModelCard,
    abstract_transformer,
    check_arrays,
    is_model_folder,
    open_array,
    quantise_layer,
    read_model_card,
    tokenizer_folder,
    unquantised_dtype,
    write_model_card,
)
from wan22_jax.outputs import check_output, replace_folder
from wan22_jax.weights import (
    Network,
    OfficialTensors,
    check_tensors,
    is_stacked,
    official_names,
    parameter_shapes,
    scale_of,
    stored_leaves,
)

_WORKERS = 2  # each holds two copies of the tensor it is copying
_CHUNK_BYTES = 2**27  # a larger tensor (the token embedding) is cut by rows
_SPARE_BYTES = 2**26  # for the metadata


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-convert", description=__doc__)
    parser.add_argument("--ckpt_path", type=Path, help="official, Diffusers or ComfyUI's folder")
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        parser.add_argument(
            f"--{part}", type=Path, help=f"file or folder to take the {part} from instead"
        )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float8"), help="default: bfloat16"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --out")
    parser.add_argument("--verify", action="store_true", help="compare --out with the source")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave the GPU to others
    logging.set_verbosity(logging.ERROR)  # Orbax warns of files that this format has not
    sources = Sources(args.ckpt_path, args.transformer, args.vae, args.text_encoder, args.tokenizer)

    def command() -> None:
        if not args.verify or args.overwrite or not is_model_folder(args.out):
            dtype = args.dtype or "bfloat16"
            card = convert(sources, args.out, dtype=dtype, overwrite=args.overwrite)
            print(f"{args.out}: complete, digest {card.digest}")  # noqa: T201
        if args.verify:
            count = verify(sources, args.out, dtype=args.dtype)
            print(f"{args.out}: {count} tensors equal the source bit for bit")  # noqa: T201

    return run_command(command)


def convert(
    sources: Path | Sources, out: Path, *, dtype: str = "bfloat16", overwrite: bool = False
) -> ModelCard:
    """Converts a checkpoint, of one folder or of several places; returns the card of the result.

    Raises BadInput if the checkpoint is not a complete TI2V-5B, out exists or the disk is too
    small, mostly before anything is written, and nothing stays; OSError if the disk fills up.
    What was written until then, or until a kill, lies in ``<out>.partial`` for the next run.
    """
    if isinstance(sources, Path):
        sources = Sources(sources)
    _check_out(out, overwrite=overwrite)
    source = open_checkpoint(sources)
    plans = plan_networks(source, dtype)
    target = out.resolve()  # a link is followed
    partial = target.with_name(target.name + ".partial")
    _check_space(partial, plans, source.tokenizer)
    identity = identify(
        {network: getattr(source, network).files.paths for network in NETWORKS},
        *(dtype, plans, source.configs, _digest_tokenizer(source.tokenizer)),
    )
    with open_progress(partial, identity) as progress, _full_disk_as_os_error(partial):
        card = _write(source, plans, partial, progress, dtype=dtype, name=str(sources))
    replace_folder(partial, out)
    return card


def verify(sources: Path | Sources, out: Path, *, dtype: str | None = None) -> int:
    """Compares every number of a converted folder with its source; returns how many tensors.

    Raises BadInput for the first tensor that differs, or if the folder is of another ``dtype``.
    """
    if isinstance(sources, Path):
        sources = Sources(sources)
    card, source = read_model_card(out), open_checkpoint(sources)
    remedy = "convert again with --overwrite, or give the source that it was made of"
    if dtype not in (None, card.dtype):
        raise BadInput(f"{out}: is {card.dtype}, not {dtype}; leave out --dtype, or {remedy}")
    for network, config in source.configs.items():
        if getattr(card, network) != config:
            raise BadInput(f"{out}: its {network} has other sizes than the source; {remedy}")
    tokenizer = {file.name: file.read_bytes() for file in tokenizer_folder(out).glob("*")}
    if tokenizer != source.tokenizer:
        raise BadInput(f"{out}: its tokenizer is not that of the source; {remedy}")
    plans = plan_networks(source, card.dtype)
    for network, plan in plans.items():
        check_arrays(out / network, {name: leaf.shape for name, leaf in plan.items()})
    count = 0
    with _make_bar(plans) as bar:
        for network in NETWORKS:
            bar.set_description(f"verify {network}")
            tensors, parts = getattr(source, network), _open_parts(out / network, plans[network])
            differing = None
            for differing in _run(_compare_tensor, tensors, parts, bar):
                if differing:
                    break
                count += 1
            if differing:
                raise BadInput(f"{out}: {network} {differing} differs from the source; {remedy}")
    return count


Plan = Mapping[str, jax.ShapeDtypeStruct]  # by parameter path, layers stacked


def _check_out(out: Path, *, overwrite: bool) -> None:
    check_output(out)
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: already exists; choose another --out or add --overwrite")
    if out.exists() and not is_model_folder(out):
        raise BadInput(f"{out}: not a converted model, so it is not replaced; choose another --out")


def plan_networks(source: Checkpoint, dtype: str) -> dict[Network, Plan]:
    """Compares every tensor with the network that the configs describe."""
    text_dim, channels = source.transformer_config.text_dim, source.transformer_config.in_channels
    modules: dict[Network, nnx.Module] = {
        "transformer": abstract_transformer(source.transformer_config, float8=False),
        "vae": nnx.eval_shape(lambda: WanVAE(source.vae_config, rngs=nnx.Rngs(0))),
        "text_encoder": nnx.eval_shape(lambda: UMT5(source.text_encoder_config, rngs=nnx.Rngs(0))),
    }
    for network, module in modules.items():
        check_tensors(getattr(source, network), network, parameter_shapes(module))
    for what, ours, theirs in (
        ("text_dim", text_dim, source.text_encoder_config.dim),
        ("latent channels", channels, source.vae_config.z_dim),
    ):
        if ours != theirs:
            raise BadInput(
                f"{source.transformer.files.where}: the transformer's {what} {ours} is not the "
                f"{theirs} of the networks beside it; download Wan2.2-TI2V-5B again"
            )
    if dtype == FLOAT8:
        modules["transformer"] = abstract_transformer(source.transformer_config, float8=True)
    return {
        network: stored_leaves(
            module, jnp.float32 if network == "vae" else unquantised_dtype(dtype)
        )
        for network, module in modules.items()
    }


def _check_space(
    partial: Path, plans: Mapping[Network, Plan], tokenizer: Mapping[str, bytes]
) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(_num_bytes(leaf) for plan in plans.values() for leaf in plan.values())
    needed += sum(map(len, tokenizer.values())) + _SPARE_BYTES
    free = shutil.disk_usage(partial.parent).free + used_bytes(partial)
    if free < needed:
        raise BadInput(
            f"{partial.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; "
            "free some space or choose another --out"
        )


def _write(
    source: Checkpoint,
    plans: Mapping[Network, Plan],
    partial: Path,
    progress: Progress,
    *,
    dtype: str,
    name: str,
) -> ModelCard:
    tokenizer_folder(partial).mkdir(exist_ok=True)
    for file, content in source.tokenizer.items():
        (tokenizer_folder(partial) / file).write_bytes(content)
    digests: dict[str, str] = {}
    with _make_bar(plans) as bar:
        for network in NETWORKS:
            bar.set_description(network)
            parts = write_network(
                getattr(source, network),
                plans[network],
                partial.absolute() / network,
                bar,
                done=progress.done.get(network, {}),
                note=partial_function(progress.add, network),
            )
            if network == "text_encoder":
                parts += _digest_tokenizer(source.tokenizer)
            digests[network] = digest_network(source.configs[network], parts)
    card = ModelCard(
        dtype=dtype,
        source=name,
        transformer=source.transformer_config,
        vae=source.vae_config,
        text_encoder=source.text_encoder_config,
        digests=digests,
        digest=digest_networks(digests),
    )
    write_model_card(partial, card)
    return card


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


@contextlib.contextmanager
def _full_disk_as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # TensorStore's only kind
        if not is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def digest_network(config: Any, lines: Sequence[str]) -> str:
    """Hashes a network: its config, a dataclass, and what ``write_network`` says of it."""
    return _digest([json.dumps(asdict(config), sort_keys=True), *lines])


def digest_networks(digests: Mapping[str, str]) -> str:
    """Hashes a model by the digests of its networks."""
    return _digest([digests[network] for network in NETWORKS])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make_bar(plans: Mapping[Network, Plan]) -> tqdm:
    num_bytes = sum(_num_bytes(leaf) for plan in plans.values() for leaf in plan.values())
    return tqdm(total=num_bytes, unit="B", unit_scale=True, unit_divisor=1000)


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _part_bytes(part: ts.TensorStore) -> int:
    return math.prod(part.shape) * part.dtype.numpy_dtype.itemsize


def _digest_tokenizer(files: Mapping[str, bytes]) -> list[str]:
    return [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in files.items()]


if __name__ == "__main__":
    raise SystemExit(main())
