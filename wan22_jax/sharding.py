"""Where arrays and programs live: the mesh, the device's memory, compiled programs on disk."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wan22_jax.errors import BadInput

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


def make_mesh() -> Mesh:
    """Makes the mesh of the first local device (axis "data")."""
    return Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


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
