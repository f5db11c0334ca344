"""Where arrays live: one mesh, and the sharding of everything that enters the train step."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """Makes the mesh of the first local device (axis "data")."""
    return Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
