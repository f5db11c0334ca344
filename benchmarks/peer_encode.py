"""How long do the VAE and the text encoder take in PyTorch?

Diffusers' AutoencoderKLWan and transformers' UMT5EncoderModel of the Wan2.2 5B sizes with random
weights; inputs are on the device already. Prints one line of JSON as encode.py does. Needs torch,
diffusers and transformers.

    python benchmarks/peer_encode.py vae --bucket 1280x704x121
    python benchmarks/peer_encode.py text
    python benchmarks/peer_encode.py vae --tiny --bucket 32x32x5   # on a CPU
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
import transformers

NUM_TEXT = 512
Z_DIM = 48
VAE = {"base_dim": 160, "decoder_base_dim": 256}
TINY_VAE = {"base_dim": 8, "decoder_base_dim": 8}
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240}
UMT5 |= {"num_layers": 24, "num_heads": 64}
TINY_UMT5 = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64}
TINY_UMT5 |= {"num_layers": 2, "num_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("vae", "text"))
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        run = make_vae_call(args, dtype) if args.part == "vae" else make_text_call(args)
        measure(run)
        seconds = [measure(run) for _ in range(args.repeats)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    result = {
        "program": "torch",
        "part": args.part,
        "dtype": args.dtype if args.part == "vae" else "bfloat16",
        **({"bucket": args.bucket} if args.part == "vae" else {"prompts": args.prompts}),
        "s": round(statistics.median(seconds), 4),
        "s_all": [round(value, 4) for value in seconds],
        "peak_gb": round(peak / 1e9, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    print("RESULT " + json.dumps(result), flush=True)


def make_vae_call(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], object]:
    vae = make_vae(TINY_VAE if args.tiny else VAE, dtype)
    width, height, frames = map(int, args.bucket.split("x"))
    video = torch.randn(1, 3, frames, height, width, dtype=dtype)

    def run() -> torch.Tensor:
        return vae.encode(video).latent_dist.mode()

    return run


def make_vae(sizes: dict[str, int], dtype: torch.dtype) -> diffusers.AutoencoderKLWan:
    """Makes the Wan2.2 VAE with random weights."""
    vae = diffusers.AutoencoderKLWan(
        **sizes,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    return vae.to(dtype).eval()


def make_text_call(args: argparse.Namespace) -> Callable[[], object]:
    sizes = TINY_UMT5 if args.tiny else UMT5
    config = transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu")
    torch.set_default_dtype(torch.bfloat16)
    encoder = transformers.UMT5EncoderModel(config).eval()
    torch.set_default_dtype(torch.float32)
    tokens = torch.randint(0, sizes["vocab_size"], (args.prompts, NUM_TEXT))
    mask = torch.ones_like(tokens)
    return lambda: encoder(tokens, mask)


def measure(run: Callable[[], object]) -> float:
    """Seconds of a call, its kernels included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
