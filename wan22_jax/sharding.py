"""Where arrays live: one mesh, and the sharding of everything that enters the train step."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """Makes the mesh of the first local device (axis "data")."""
    return Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def claim_gpu_memory() -> None:
    """Lets JAX use nearly all of a GPU, which it otherwise limits to three quarters.

    Before the first array is made; a user's own setting wins.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
