"""The text encoder where GPU memory is short: its weights stay in host memory.

Each layer is copied to the device while the one before it computes. The 24 layers of the checkpoint
are 9.3 GB in bfloat16; three of them, 1.2 GB, are on the device at a time.
"""

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wan22_jax.model.umt5 import UMT5, relative_buckets


class StreamedUMT5:
    """Encodes as the ``UMT5`` that it is made of, to the same bits."""

    def __init__(self, encoder: UMT5):
        """Pins the layers of an encoder whose arrays are NumPy's, which gives them up for that."""
        self.config = encoder.config
        device = jax.local_devices()[0]
        self._on_device = jax.sharding.SingleDeviceSharding(device)
        pinned = self._on_device.with_memory_kind("pinned_host")
        self._table_VE = np.asarray(encoder.token_embedding.weight[...])
        self._norm, norm = nnx.split(encoder.norm)
        self._norm_state = jax.device_put(norm, self._on_device)
        self._block, stacked = nnx.split(encoder.blocks)
        paths, stacks = map(list, zip(*nnx.to_flat_state(stacked), strict=True))
        layers: list[list] = [[] for _ in range(self.config.num_layers)]
        while stacks:
            stack = stacks.pop(0)
            for layer, array in zip(layers, stack[...], strict=True):
                layer.append(stack.replace(jax.device_put(array, pinned)))
        self._layers = [
            nnx.from_flat_state(list(zip(paths, leaves, strict=True))) for leaves in layers
        ]

    def __call__(
        self, tokens_BS: Int[np.ndarray, "B S"], mask_BS: Bool[np.ndarray, "B S"]
    ) -> Float[Array, "B S E"]:
        """Returns one embedding a token; see ``UMT5``."""
        x_BSE = jax.device_put(self._table_VE[tokens_BS], self._on_device)
        rest = jax.device_put((mask_BS, relative_buckets(tokens_BS.shape[1])), self._on_device)
        following = jax.device_put(self._layers[0], self._on_device)
        for number in range(1, len(self._layers) + 1):
            layer, before_BSE = following, x_BSE
            if number < len(self._layers):
                following = jax.device_put(self._layers[number], self._on_device)
            x_BSE = _run_layer(self._block, layer, x_BSE, *rest)
            jax.block_until_ready(before_BSE)  # or all layers would be on their way at once
        return _run_norm(self._norm, self._norm_state, x_BSE)


@jax.jit(static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef,
    layer: nnx.State,
    x_BSE: jax.Array,
    is_token_BS: jax.Array,
    buckets_SS: jax.Array,
) -> jax.Array:
    return nnx.merge(graphdef, layer)(x_BSE, is_token_BS.astype(bool), buckets_SS)


@jax.jit(static_argnums=0)
def _run_norm(graphdef: nnx.GraphDef, norm: nnx.State, x_BSE: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, norm)(x_BSE)
