"""``wan22-download``: the files of Wan2.2 TI2V-5B come from the Hugging Face hub, whole and proven.

The files that ``wan22-convert`` reads, in one of three layouts. What is there already, with the
digest that the hub states, is kept; what was cut off is gone on with. A mirror (``HF_ENDPOINT``),
a token (``HF_TOKEN``) and proxies are those of huggingface_hub.
"""

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wan22_jax.errors import BadInput, is_full_disk, run_command
from wan22_jax.outputs import check_folder

if TYPE_CHECKING:
    from huggingface_hub import RepoFile


@dataclass(frozen=True)
class Layout:
    """A repository of the hub, and the files of it that a conversion needs."""

    repo: str
    files: tuple[str, ...]


_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _shards(stem: str, count: int) -> tuple[str, ...]:
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return (*names, f"{stem}.safetensors.index.json")


LAYOUTS = {
    "official": Layout(
        "Wan-AI/Wan2.2-TI2V-5B",
        (
            "config.json",
            *_shards("diffusion_pytorch_model", 3),
            "Wan2.2_VAE.pth",
            "models_t5_umt5-xxl-enc-bf16.pth",
            *(f"google/umt5-xxl/{name}" for name in _TOKENIZER),
        ),
    ),
    "diffusers": Layout(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        (
            "transformer/config.json",
            *_shards("transformer/diffusion_pytorch_model", 5),
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/config.json",
            *_shards("text_encoder/model", 3),
            *(f"tokenizer/{name}" for name in _TOKENIZER),
        ),
    ),
    "comfyui": Layout(
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        (
            "split_files/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
            "split_files/vae/wan2.2_vae.safetensors",
            "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        ),
    ),
}
_SPARE_BYTES = 2**26
_BLOCK = 2**22


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-download", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to download into")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="diffusers",
        help="diffusers (default, 34 GB), official (34 GB, converting needs PyTorch) or comfyui "
        "(18 GB: float16, and a float8 text encoder)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the hub")
    args = parser.parse_args(argv)

    def command() -> None:
        download(LAYOUTS[args.layout], args.out, revision=args.revision)
        print(  # noqa: T201
            f"{args.out}: complete, every digest is the hub's; go on with "
            f"wan22-convert --ckpt_path {args.out} --out models/wan2.2_5b"
        )

    return run_command(command)


def download(
    layout: Layout, out: Path, *, revision: str = "main", endpoint: str | None = None
) -> list[Path]:
    """Downloads a layout's files, all of one commit, and compares their digests.

    Args:
        layout: one of LAYOUTS.
        out: folder; the files keep their paths in it.
        revision: branch, tag or commit.
        endpoint: of a hub; by default that of huggingface_hub.

    Raises:
        BadInput: the hub cannot be reached or does not have a file, there is no room for them, or
            one came with another digest (it is deleted). What was cut off stays, as ``.partial``.
    """
    _check_environment()
    check_folder(out)
    from huggingface_hub import HfApi, RepoFile

    api = HfApi(endpoint=endpoint)
    page = f"{api.endpoint}/{layout.repo}"
    with _as_bad_input(page, out, revision):
        commit = str(api.model_info(layout.repo, revision=revision).sha)
        entries = api.get_paths_info(layout.repo, list(layout.files), revision=commit)
    found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if lost := [name for name in layout.files if name not in found]:
        raise BadInput(f"{page}: {', '.join(lost)} not there at {revision}; try another --revision")
    whole = {name for name, entry in found.items() if _has_digest(out / name, entry)}
    _check_space(out, [found[name] for name in layout.files if name not in whole])
    for name in layout.files:
        if name in whole:
            continue
        partial = out / f"{name}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _as_bad_input(page, out, revision):
            _fetch(layout.repo, name, commit, api.endpoint, partial, size=found[name].size)
        if not _has_digest(partial, found[name]):
            partial.unlink()
            raise BadInput(
                f"{out / name}: came with another digest than the hub states, and was deleted; "
                "run the same command again"
            )
        partial.replace(out / name)
    return [out / name for name in layout.files]


def _check_environment() -> None:
    """Raises BadInput for an HF_ENDPOINT with which the library cannot even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is None:
        return
    try:
        parts = urlsplit(endpoint)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address = is_address and parts.port != 0  # ValueError if it is beyond 65535
    except ValueError:
        is_address = False
    if not is_address:
        raise BadInput(
            f"HF_ENDPOINT: is {endpoint!r}, an address like https://huggingface.co was expected; "
            "set it to that of a mirror, or unset it"
        )


def _fetch(repo: str, name: str, commit: str, endpoint: str, partial: Path, *, size: int) -> None:
    """Appends to a partial file what it lacks. The library's own download starts afresh."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
    location = get_hf_file_metadata(url, endpoint=endpoint, retry_on_errors=True).location
    headers = build_hf_headers()
    if urlsplit(location).netloc != urlsplit(endpoint).netloc:  # the token is for the hub alone
        headers.pop("authorization", None)
    with partial.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
        http_get(
            location,
            file,
            resume_size=file.seek(0, os.SEEK_END),
            headers=headers,
            expected_size=size,
            displayed_filename=name,
        )


def _has_digest(file: Path, entry: "RepoFile") -> bool:
    """Compares a file with what the hub says: SHA-256 of a large one, git's hash of a small one."""
    if not file.is_file() or file.stat().st_size != entry.size:
        return False
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(f"blob {entry.size}\0".encode())
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _check_space(out: Path, entries: "Sequence[RepoFile]") -> None:
    out.mkdir(parents=True, exist_ok=True)
    begun = sum(path.stat().st_size for path in out.rglob("*.partial"))
    needed = sum(entry.size for entry in entries) - begun + _SPARE_BYTES
    free = shutil.disk_usage(out).free
    if entries and free < needed:
        raise BadInput(
            f"{out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; free some "
            "space or choose another --out"
        )


@contextmanager
def _as_bad_input(page: str, out: Path, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    # HTTPError of whichever httpx the library is built on.
    network_error: Any = errors.HfHubHTTPError.__bases__[0]
    by_hand = f"or fetch the files by hand from {page}/tree/{revision} into {out}"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{page}: has no revision {revision}; try another --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"{page}: is not there, or not for you; set HF_TOKEN to a token that may read it (or "
            f"run hf auth login), {by_hand}"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise BadInput(f"{page}: HF_HUB_OFFLINE is set; unset it, {by_hand}") from error
    except (OSError, network_error, ValueError, KeyError, TypeError) as error:
        if is_full_disk(error):
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BadInput(
            f"{page}: could not be read ({reason[0]:.200}); run the same command again to go on, "
            f"check network and proxy, set HF_ENDPOINT to a mirror, {by_hand}"
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
