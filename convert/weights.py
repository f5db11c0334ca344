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
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial as partial_function
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from tqdm import tqdm

from convert.checkpoints import Checkpoint, Sources, open_checkpoint
from convert.progress import Progress, identify, open_progress, used_bytes
from convert.written_network import (
    Plan,
    compare_network,
    digest_network,
    digest_networks,
    write_network,
)
from wan22_jax.errors import BadInput, is_full_disk, run_command
from wan22_jax.model.umt5 import UMT5
from wan22_jax.model.vae import WanVAE
from wan22_jax.model_folder import (
    FLOAT8,
    NETWORKS,
    ModelCard,
    abstract_transformer,
    check_arrays,
    is_model_folder,
    read_model_card,
    tokenizer_folder,
    unquantised_dtype,
    write_model_card,
)
from wan22_jax.outputs import check_output, replace_folder
from wan22_jax.weights import (
    Network,
    check_tensors,
    parameter_shapes,
    stored_leaves,
)

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
            compared = compare_network(getattr(source, network), plans[network], out / network, bar)
            for differing in compared:
                if differing:
                    compared.close()
                    raise BadInput(
                        f"{out}: {network} {differing} differs from the source; {remedy}"
                    )
                count += 1
    return count


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
    needed = _count_bytes(plans)
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


@contextlib.contextmanager
def _full_disk_as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # TensorStore's only kind
        if not is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _make_bar(plans: Mapping[Network, Plan]) -> tqdm:
    return tqdm(total=_count_bytes(plans), unit="B", unit_scale=True, unit_divisor=1000)


def _count_bytes(plans: Mapping[Network, Plan]) -> int:
    leaves = [leaf for plan in plans.values() for leaf in plan.values()]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _digest_tokenizer(files: Mapping[str, bytes]) -> list[str]:
    return [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in files.items()]


if __name__ == "__main__":
    raise SystemExit(main())
