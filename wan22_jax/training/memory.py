"""What of a run takes device memory, and which setting to change when there is too little?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket
from wan22_jax.model.remat import POLICIES


class MemoryPlan(NamedTuple):
    """The settings that memory depends on, beside the clips."""

    dtype: str  # of the frozen weights
    num_blocks: int
    blocks_to_swap: int  # may be more than there are
    activation_checkpointing: bool | str  # a key of remat.POLICIES
    micro_batch: int

    def __str__(self) -> str:
        names: dict[bool | str, str] = {False: "kept", True: "recomputed"}
        kept = names.get(self.activation_checkpointing, self.activation_checkpointing)
        on_host = min(self.blocks_to_swap, self.num_blocks)
        blocks = f"{on_host} of {self.num_blocks} blocks in host memory"
        return f"{self.dtype} weights, {blocks}, activations: {kept}"


@contextmanager
def explain_exhaustion(plan: MemoryPlan, bucket: Bucket | None = None) -> Iterator[None]:
    """Turns JAX's error when memory runs out into one that names the next setting to try.

    Args:
        plan: the settings.
        bucket: what is trained; None while the model is loaded.

    Raises:
        BadInput: memory ran out.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if bucket is None:
            remedies = [*_next_weights(plan), "lower [adapter] rank"]
            where = "loading the model"
        else:
            remedies = [
                *(_next_activations(plan) or _next_weights(plan)),
                *(["lower micro_batch_size_per_gpu"] if plan.micro_batch > 1 else []),
                "train on smaller resolutions or frame_buckets",
            ]
            where = f"at {bucket} ({bucket.num_tokens} tokens a clip)"
        uses_host = plan.blocks_to_swap > 0 or POLICIES[plan.activation_checkpointing].on_host
        what = "GPU memory, or pinned host memory," if uses_host else "GPU memory"
        raise BadInput(f"out of {what} {where}; {', or '.join(remedies)}") from error


# From the setting that costs the least time to the one that costs the most.
def _next_activations(plan: MemoryPlan) -> list[str]:
    on_host = POLICIES[plan.activation_checkpointing].on_host
    return [] if on_host == 1 else ["set activation_checkpointing = 'offload_attention'"]


def _next_weights(plan: MemoryPlan) -> list[str]:
    if plan.dtype != "float8":
        return ["set [model] transformer_dtype = 'float8'"]
    if plan.blocks_to_swap < plan.num_blocks:
        return [f"set blocks_to_swap = {plan.num_blocks}"]
    return []
