"""How fast is a conversion, and in how much memory? A random official folder, converted.

    python benchmarks/conversion.py --folder /tmp/speed --gigabytes 6

makes the folder (layers of the real size, as many as fit into so many GB of float32), converts it
in a process of its own, whose address space beyond its libraries may be limited (``--limit_gb``),
and prints seconds, GB read a second and the peak of resident memory. The source is read once
before, so that it comes from the page cache as far as there is memory for it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from wan22_jax.demo_checkpoint import write_checkpoint
from wan22_jax.model.transformer import TransformerConfig, WanTransformer

CHILD = """
import resource, sys
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from convert.weights import main
code = main(sys.argv[2:])
print("peak_kb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch, emptied afterwards")
    parser.add_argument("--gigabytes", type=float, default=6, help="of the transformer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit_gb", type=float, default=0, help="memory of the process; 0: none")
    parser.add_argument("--verify", action="store_true", help="time --verify too")
    args = parser.parse_args()
    source, out = args.folder / "source", args.folder / "out"
    num_bytes = make_source(source, args.gigabytes)
    for file in source.iterdir():
        if file.is_file():
            warm(file)
    flags = ["--ckpt_path", source, "--out", out, "--dtype", args.dtype]
    runs = [("convert", flags)] + [("verify", [*flags, "--verify"])] * args.verify
    try:
        for name, arguments in runs:
            seconds, peak = run(arguments, limit_bytes=int(args.limit_gb * 1e9))
            print(
                f"{name} {args.dtype}: {num_bytes / 1e9:.1f} GB of source in {seconds:.1f} s, "
                f"{num_bytes / 1e9 / seconds:.2f} GB/s, peak {peak / 1e9:.2f} GB"
            )
    finally:
        shutil.rmtree(args.folder)
    return 0


def make_source(folder: Path, gigabytes: float) -> int:
    """Writes an official folder with layers of full size; returns the bytes of its transformer."""
    full = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "text_dim": 32}
    layer_bytes = 4 * (8 * 3072**2 + 2 * 3072 * 14336)
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    config = TransformerConfig(**full, num_layers=layers)
    write_checkpoint(folder, captions=["a cat"])
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    write_shard(folder / "diffusion_pytorch_model-00001-of-00001.safetensors", config)
    config_file = folder / "config.json"
    fields = json.loads(config_file.read_text()) | full | {"num_layers": layers, "freq_dim": 256}
    config_file.write_text(json.dumps(fields))
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def write_shard(file: Path, config: TransformerConfig) -> None:
    """Writes random float32 numbers, the same few megabytes again and again."""
    from flax import nnx

    from wan22_jax.weights import parameter_shapes

    shapes = parameter_shapes(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    numbers = np.random.default_rng(0).standard_normal(2**22, np.float32).tobytes()
    with file.open("wb") as content:
        content.write(len(header).to_bytes(8, "little") + header)
        while end > 0:
            content.write(numbers[:end])
            end -= len(numbers)


def warm(file: Path) -> None:
    with file.open("rb") as content:
        while content.read(2**24):
            pass


def run(arguments: list, *, limit_bytes: int) -> tuple[float, int]:
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(limit_bytes), *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - start
    return seconds, 1024 * int(output.split("peak_kb")[1])


if __name__ == "__main__":
    raise SystemExit(main())
