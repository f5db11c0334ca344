"""What does XLA make of the 5B train step on an H100? Answered on a machine that has none.

Compiles the step that train_step.py times, for a described GPU, and prints how long that took, the
memory that the program needs and how many kernels of each kind a step starts. Nothing is run or
autotuned, and weights in host memory (--blocks_to_swap) count as arguments on the device. Needs
CUDA's compiler and libraries: pip install 'jax[cuda13]'.

    python benchmarks/compile_step.py --bucket 512x512x33 --dtype float8 \
        --activation_checkpointing keep_matmuls --hlo step.hlo
"""

import argparse
import importlib.util
import os
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.tree_util import DictKey, SequenceKey
from kernel_table import short_name
from random_model import (
    add_lora,
    add_step_arguments,
    build_step,
    make_full_optimizer,
    make_model,
    masters_dtype,
    place,
    read_split,
)
from train_step import make_adamw, make_batch

from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model import fp8, hopper_matmul
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.shards import AXES
from wan22_jax.model.transformer import TI2V_5B
from wan22_jax.sharding import claim_gpu, make_mesh, of_array, of_examples, replicated
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.full import split_full
from wan22_jax.training.step import Frozen, Optimizer, init_state, split_model
from wan22_jax.weights import is_stacked, stored_dtype

# An H100 SXM as its driver describes it, but for its memory: XLA plans with 80 % of what is said
# here, and on a real one, of 84.9 GB, with the 95 % that JAX may use.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 100853600256
  cuda_compute_capability { major: 9 }
}
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 13 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = {
    "__cublas$lt$matmul$f8": "cuBLAS, float8",
    "__cublas": "cuBLAS",
    "__cudnn": "cuDNN",
    "__gpu$xla.gpu.triton": "Triton",
    "mosaic_gpu": "Mosaic GPU",
}


def main() -> None:
    args = parse_arguments()
    cuda = find_cuda()
    if cuda is None:
        print("CUDA's compiler is missing: pip install 'jax[cuda13]' brings it", file=sys.stderr)
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to check
    claim_gpu(counts_host=args.full is not None)
    os.environ["XLA_FLAGS"] += f" --xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0"

    lowered, trace_s = lower_step(args)
    start = time.perf_counter()
    compiled = lowered.compile()
    print(f"traced in {trace_s:.1f} s, compiled in {time.perf_counter() - start:.1f} s")
    memory = compiled.memory_analysis()
    assert memory is not None
    print(
        f"GB of arguments {memory.argument_size_in_bytes / 1e9:.2f}, "
        f"temporary {memory.temp_size_in_bytes / 1e9:.2f}, "
        f"outputs {memory.output_size_in_bytes / 1e9:.2f} of which in place of arguments "
        f"{memory.alias_size_in_bytes / 1e9:.2f}; "
        f"on the host, arguments {memory.host_argument_size_in_bytes / 1e9:.2f}, "
        f"temporary {memory.host_temp_size_in_bytes / 1e9:.2f}, "
        f"outputs {memory.host_output_size_in_bytes / 1e9:.2f} of which in place "
        f"{memory.host_alias_size_in_bytes / 1e9:.2f}"
    )
    hlo = compiled.as_text()
    assert hlo is not None
    print(format_counts(count_kernels(hlo)))
    if args.hlo:
        args.hlo.write_text(hlo)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.add_argument("--hlo", type=Path, help="write the scheduled HLO here")
    return parser.parse_args()


def find_cuda() -> Path | None:
    """The folder of CUDA's compiler that JAX's plugin came with."""
    wheels = importlib.util.find_spec("nvidia")
    if wheels is None or importlib.util.find_spec("jax_cuda13_plugin") is None:
        return None
    folders = (Path(folder, "cu13") for folder in wheels.submodule_search_locations or ())
    return next(filter(Path.is_dir, folders), None)


def describe(path: tuple, leaf: jax.ShapeDtypeStruct, *, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Says where an argument of the step lies, by its place among them."""
    where = replicated(mesh)
    number, names = path[0].idx, [key.key for key in path if isinstance(key, DictKey)]
    if number == 2:
        where = of_examples(mesh)
    elif names and (is_stacked(names[-1]) or any(isinstance(key, SequenceKey) for key in path[1:])):
        where = of_array(where, str(names[-1]), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def lower_step(args: argparse.Namespace) -> tuple[jax.stages.Lowered, float]:
    """Traces the step, with arrays that have shapes alone, as a GPU would."""
    graphdef: nnx.GraphDef | None = None

    def make_arguments() -> tuple:
        nonlocal graphdef
        model = make_model(TI2V_5B, dtype=args.dtype)
        if args.full:
            graphdef, weights, template = split_full(model, dtype=jnp.bfloat16)
            masters = {
                name: jnp.asarray(array, stored_dtype(name, masters_dtype(args.full)))
                for name, array in weights.items()
            }
            state = init_state(masters, optimizer)
            return state, Frozen(template), batch, jax.random.key(0), sigma_grid()
        add_lora(model, seed=2)
        graphdef, trainable, frozen = split_model(model)
        placed = place(
            frozen,
            activation_checkpointing=args.activation_checkpointing,
            blocks_to_swap=args.blocks_to_swap,
            mesh=make_mesh(),
        )
        state = init_state(trainable, optimizer)
        return state, placed, batch, jax.random.key(0), sigma_grid()

    bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    split = read_split(args)
    batch = make_batch(TI2V_5B, bucket, args.batch * split.batch_shards, args.accumulate)
    optimizer: Optimizer = make_adamw()
    if args.full:
        optimizer = make_full_optimizer(args.full, offload=args.offload_optimizer)
    topology = f"1x1x{split.num_devices}"  # hosts, devices of each
    h100 = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=topology)
    grid = np.array(h100.devices).reshape(split)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    arguments = jax.tree_util.tree_map_with_path(
        partial(describe, mesh=mesh), jax.eval_shape(make_arguments)
    )
    assert graphdef is not None
    if isinstance(optimizer, BlockwiseOptimizer):
        opt_state = optimizer.describe_state(arguments[0].trainable)
        arguments = (arguments[0]._replace(opt_state=opt_state), *arguments[1:])
    step = build_step(
        graphdef,
        optimizer,
        activation_checkpointing=args.activation_checkpointing,
        state=arguments[0],
        frozen=arguments[1],
    )
    start = time.perf_counter()
    with (
        # What the package asks to choose its kernels.
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(fp8, "has_float8_matmul", return_value=True),
        mock.patch.object(hopper_matmul, "count_cores", return_value=h100.devices[0].core_count),
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        lowered = step.lower(*arguments)
    return lowered, time.perf_counter() - start


def count_kernels(hlo: str) -> Counter[tuple[str, str]]:
    """Counts what a run of the program starts, by kind and name; loops count as often as they run.

    Args:
        hlo: text of a compiled module.
    """
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            body = bodies["ENTRY" if head[1] else head[2]] = []
        elif line.startswith("  "):
            body.append(line)
    return _count(bodies, "ENTRY")


def _count(bodies: dict[str, list[str]], name: str) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for line in bodies[name]:
        parts = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(", line)
        if parts is None:
            continue
        name, operation = parts.groups()
        if operation in ("fusion", "fusion-start"):
            found["fusion", short_name(name)] += 1
        elif operation in ("copy", "copy-start"):
            found["copy", operation] += 1
        elif operation == "custom-call":
            found[_describe_call(line)] += 1
        elif operation in ("while", "call"):
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inner = re.search(r"(?:body|to_apply)=%([\w.\-]+)", line)
            assert inner is not None, line
            for key, count in _count(bodies, inner[1]).items():
                found[key] += count * int(times[1] if times else 1)
    return found


def _describe_call(line: str) -> tuple[str, str]:
    target = re.search(r'custom_call_target="([^"]+)"', line)
    assert target is not None, line
    kind = next((KINDS[start] for start in KINDS if target[1].startswith(start)), "other call")
    kernel = re.search(r"(\w+)\)*/(?:pallas_call|mpmd_map)", line)
    return kind, kernel[1] if kernel else target[1]


def format_counts(counts: Counter[tuple[str, str]]) -> str:
    """A line for each kind, and for each name under it, the most frequent first."""
    kinds: Counter[str] = Counter()
    for (kind, _), count in counts.items():
        kinds[kind] += count
    lines = []
    for kind, total in kinds.most_common():
        lines.append(f"{total:6d} {kind}")
        lines += [f"{n:12d} {name}" for (other, name), n in counts.most_common() if other == kind]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
