"""Where arrays and programs live: the mesh, the device's memory, compiled programs on disk."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wan22_jax.errors import BadInput
from wan22_jax.model.shards import AXES, CONTEXT, DATA, FSDP, Shards, is_split

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nnx.Module)

# XLA ends a process whose flags it does not know: these it knows from jaxlib 0.10.2 to 0.12.0.1.
_XLA_FLAGS = {
    "xla_gpu_enable_triton_gemm": "false",
    "xla_gpu_dot_merger_threshold_mb": "0",
    # It copies bfloat16 matrices that have no multiple of 8 rows, as clips of 8,190 tokens do.
    "xla_disable_hlo_passes": "cublas-pad-for-gemms",
    # Copies under way at a time: more than two blocks have.
    "xla_gpu_experimental_parallel_async_compute_limit": "64",
}
_DETERMINISTIC = "xla_gpu_deterministic_ops"
_PLANNED_MEMORY = "xla_gpu_memory_limit_slop_factor"  # percent of the GPU's


class Split(NamedTuple):
    """Among how many devices each is divided."""

    data: int = 1  # examples; every device has all weights
    fsdp: int = 1  # examples, and the rows of the blocks' matrices
    context: int = 1  # the tokens of each example

    @property
    def num_devices(self) -> int:
        """Of all together."""
        return self.data * self.fsdp * self.context

    @property
    def batch_shards(self) -> int:
        """Parts of a micro-batch."""
        return self.data * self.fsdp


def make_mesh(split: Split | None = None) -> Mesh:
    """Makes the mesh of the first local device or, given a split, of the first ones of all."""
    devices = jax.local_devices()[:1] if split is None else jax.devices()[: split.num_devices]
    grid = np.array(devices).reshape(split or Split())
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def specs_of(tree: Any) -> Any:
    """Says of each array of a tree how it is divided."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def shards_of(mesh: Mesh) -> Shards:
    """What a model is told of a mesh, inside of a shard_map over all its axes."""
    return Shards(context=mesh.shape[CONTEXT], fsdp=mesh.shape[FSDP])


def of_examples(mesh: Mesh) -> NamedSharding:
    """Arrays [A, B, ...]: each device has its examples of every micro-batch."""
    return NamedSharding(mesh, PartitionSpec(None, (DATA, FSDP)))


def of_array(sharding: NamedSharding, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of a block lies that is named as in it; matrices are divided by rows.

    Leading axes of more than a matrix (stacked layers) stay whole.
    """
    if not is_split(name, 2) or len(shape) not in (2, 3):
        return sharding
    spec = PartitionSpec(*(None,) * (len(shape) - 2), FSDP)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def put(tree: Any, shardings: Any) -> Any:
    """``jax.device_put``, also where other processes have some of the devices.

    There, every process has to have the same values; they are not compared.
    """

    def put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put_leaf(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put_leaf(leaf, shardings), tree)
    return jax.tree.map(put_leaf, tree, shardings)


def put_examples(tree: Any, mesh: Mesh, *, total: int, own: range | None = None) -> Any:
    """Puts arrays [A, B, ...] of this process where their examples are computed.

    Args:
        tree: of NumPy arrays: the examples that this process has of each micro-batch.
        mesh: of all devices.
        total: examples of a micro-batch in all processes.
        own: which parts of it these are, from ``own_examples``; None: all.
    """
    sharding = of_examples(mesh)
    first = 0 if own is None else own.start * total // (mesh.shape[DATA] * mesh.shape[FSDP])

    def put_leaf(leaf: np.ndarray) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)

        def take(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(total)
            return leaf[:, start - first : stop - first]

        shape = (leaf.shape[0], total, *leaf.shape[2:])
        return jax.make_array_from_callback(shape, sharding, take)

    return jax.tree.map(put_leaf, tree)


def own_examples(mesh: Mesh) -> range:
    """Which parts of a micro-batch, of ``Split.batch_shards``, this process computes on."""
    here = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    context = mesh.devices.shape[-1]
    parts = [number // context for number, is_here in enumerate(here) if is_here]
    return range(parts[0], parts[-1] + 1)


def choose_devices(num_devices: int | None = None) -> list[Any]:
    """Returns so many of the local devices, the first ones; all of them unless told otherwise.

    All are of the first one's kind: others would give other bits, and may be too small.

    Raises:
        BadInput: there are fewer.
    """
    found = jax.local_devices()
    alike = [device for device in found if device.device_kind == found[0].device_kind]
    if num_devices is not None and not 1 <= num_devices <= len(alike):
        raise BadInput(
            f"--devices {num_devices}: this process sees {len(alike)} ({found[0].device_kind}); "
            f"expected 1 to {len(alike)}, or nothing for all"
        )
    return alike[:num_devices]


def copy_to_each(module: ModuleT, devices: Sequence[Any]) -> list[ModuleT]:
    """Returns the module, which is on the first device, and a copy of it on each other one."""
    graphdef, state = nnx.split(module)
    return [
        module,
        *(nnx.merge(graphdef, jax.device_put(state, device)) for device in devices[1:]),
    ]


def claim_gpu(*, deterministic: bool = False, counts_host: bool = False) -> None:
    """Sets XLA up for a GPU that is ours alone; the user's own environment variables win.

    ``deterministic``: the same bits in every run, by kernels that add in a fixed order and are
    not chosen by measuring them. ``counts_host``: an optimizer's state may wait in host memory,
    which XLA takes for the GPU's; it would spend minutes on computing again what fits.

    Before the first array is made. JAX would limit itself to three quarters of the memory;
    autotuning Triton GEMMs takes 20 s of the first train step for no faster a step (RESULTS.md);
    XLA would make one of matmuls that share an operand, copying their other operands in every step:
    weights and gradients; it would copy all activations if their rows are no multiple of 8; and of
    copies from or to the host, the third would wait for the first.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = _XLA_FLAGS | ({_DETERMINISTIC: "true"} if deterministic else {})
    wanted |= {_PLANNED_MEMORY: "400"} if counts_host else {}
    for name, value in wanted.items():
        if name not in flags:
            flags = f"{flags} --{name}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()


def keep_compiled() -> None:
    """Has JAX keep on disk what took over a second to compile, so that a later start reads it.

    In ``~/.cache/wan22_jax/xla``, or under ``XDG_CACHE_HOME``; ``JAX_COMPILATION_CACHE_DIR`` names
    another folder, or none if it is empty. A folder that cannot be written is no error.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read it, and only warns of a folder that it cannot use
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "wan22_jax", "xla")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        log.info("compiled programs are not kept: %s; set JAX_COMPILATION_CACHE_DIR", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def device_memory() -> int | None:
    """Returns how many bytes of the first device JAX may use, None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """Returns how many bytes of a local device were in use at most, None where it is not told."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(
        (each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each), default=None
    )


def describe_peak_memory() -> str:
    """Says how much memory of a local device was in use at most, where the device tells."""
    peak = peak_memory()
    return f"peak device memory {peak / 1e9:.1f} GB" if peak else "peak device memory not known"
