"""``wan22-convert``: a PyTorch model folder becomes a model folder of this project.

Weights are streamed: one layer of one tensor is read, cast, hashed and written before the next, so
host memory stays far below the size of a network. ``--dtype`` is that of the transformer (but for
what always stays float32) and of the text encoder; the VAE stays float32, in which the original
runs it. ``float8`` is a bfloat16 model whose transformer has the linears of its blocks in eight
bits, quantised from the checkpoint's own numbers. Everything is written into ``<out>.partial``,
which becomes ``<out>`` once complete.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from flax import nnx
from tqdm import tqdm

from convert.checkpoints import Checkpoint, Sources, open_checkpoint
from wan22_jax.errors import BadInput, is_full_disk, run_command
from wan22_jax.model.fp8 import is_float8
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model.vae import WanVAE
from wan22_jax.model_folder import (
    FLOAT8,
    NETWORKS,
    ModelCard,
    abstract_transformer,
    open_array,
    quantise_layer,
    tokenizer_folder,
    unquantised_dtype,
    write_model_card,
)
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
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float8"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --out")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave the GPU to others
    logging.set_verbosity(logging.ERROR)  # Orbax warns of files that this format has not

    def command() -> None:
        sources = Sources(
            args.ckpt_path, args.transformer, args.vae, args.text_encoder, args.tokenizer
        )
        card = convert(sources, args.out, dtype=args.dtype, overwrite=args.overwrite)
        print(f"{args.out}: complete, digest {card.digest}")  # noqa: T201

    return run_command(command)


def convert(
    sources: Path | Sources, out: Path, *, dtype: str = "bfloat16", overwrite: bool = False
) -> ModelCard:
    """Converts a checkpoint, of one folder or of several places; returns the card of the result.

    Raises BadInput before anything is written if the checkpoint is not a complete TI2V-5B, out
    exists or the disk is too small; OSError if the disk fills up. Either way nothing stays.
    """
    _check_out(out, overwrite=overwrite)
    if isinstance(sources, Path):
        sources = Sources(sources)
    source = open_checkpoint(sources)
    plans = _plan(source, dtype)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # of a conversion that was killed
        shutil.rmtree(partial)
    _check_space(partial, plans, source.tokenizer)
    try:
        with _full_disk_as_os_error(partial):
            card = _write(source, plans, partial, dtype=dtype, name=str(sources))
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return card


Plan = Mapping[str, jax.ShapeDtypeStruct]  # by parameter path, layers stacked


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: already exists; choose another --out or add --overwrite")
    if out.exists() and not (out / "model.json").is_file():
        raise BadInput(f"{out}: not a converted model, so it is not replaced; choose another --out")


def _plan(source: Checkpoint, dtype: str) -> dict[Network, Plan]:
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
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise BadInput(
            f"{partial.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; "
            "free some space or choose another --out"
        )


def _write(
    source: Checkpoint, plans: Mapping[Network, Plan], partial: Path, *, dtype: str, name: str
) -> ModelCard:
    configs = {
        "transformer": source.transformer_config,
        "vae": source.vae_config,
        "text_encoder": source.text_encoder_config,
    }
    partial.mkdir()
    tokenizer_folder(partial).mkdir()
    for file, content in source.tokenizer.items():
        (tokenizer_folder(partial) / file).write_bytes(content)
    num_bytes = sum(_num_bytes(leaf) for plan in plans.values() for leaf in plan.values())
    digests: dict[str, str] = {}
    with tqdm(total=num_bytes, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        for network in NETWORKS:
            bar.set_description(network)
            parts = write_network(
                getattr(source, network), plans[network], partial.absolute() / network, bar
            )
            if network == "text_encoder":
                parts += [
                    f"{file} {hashlib.sha256(content).hexdigest()}"
                    for file, content in source.tokenizer.items()
                ]
            digests[network] = digest_network(configs[network], parts)
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


def write_network(tensors: OfficialTensors, plan: Plan, path: Path, bar: tqdm) -> list[str]:
    """Writes one Orbax checkpoint; returns a line with name, dtype, shape and hash per tensor."""
    _reserve(path, plan)
    parts: dict[str, ts.TensorStore] = {}  # by official name
    for stacked_name, leaf in plan.items():
        array = open_array(path / stacked_name)
        for layer, name in enumerate(official_names(stacked_name, leaf.shape)):
            parts[name] = array[layer] if is_stacked(stacked_name) else array

    def copy(name: str) -> tuple[list[str], int]:
        if is_float8(parts[name].dtype.numpy_dtype):
            return _quantise_tensor(tensors, name, parts[name], parts[scale_of(name)])
        return _copy_tensor(tensors, name, parts[name])

    lines = []
    with ThreadPoolExecutor(_WORKERS) as workers:
        names = [name for name in parts if name in tensors.stored_names]  # a scale has no source
        for new_lines, num_bytes in workers.map(copy, names):
            lines += new_lines
            bar.update(num_bytes)
    return sorted(lines)


def _copy_tensor(
    tensors: OfficialTensors, name: str, target: ts.TensorStore
) -> tuple[list[str], int]:
    dtype, shape = target.dtype.numpy_dtype, target.shape
    step = target.chunk_layout.read_chunk_template.shape[0]
    digest = hashlib.sha256()
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        block = np.ascontiguousarray(tensors.read(name, rows, dtype=dtype))
        writing = target[rows].write(block)
        digest.update(block.view(np.uint8).data)
        writing.result()
    line = f"{name} {dtype} {list(shape)} {digest.hexdigest()}"
    return [line], math.prod(shape) * dtype.itemsize


def _quantise_tensor(
    tensors: OfficialTensors, name: str, target: ts.TensorStore, target_scale: ts.TensorStore
) -> tuple[list[str], int]:
    blocks = map(np.asarray, quantise_layer(tensors.read(name)))
    lines, num_bytes = [], 0
    for key, part, block in zip(
        (name, scale_of(name)), (target, target_scale), blocks, strict=True
    ):
        part.write(block).result()
        digest = hashlib.sha256(block.tobytes()).hexdigest()
        lines.append(f"{key} {block.dtype} {list(block.shape)} {digest}")
        num_bytes += block.nbytes
    return lines, num_bytes


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


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


if __name__ == "__main__":
    raise SystemExit(main())
