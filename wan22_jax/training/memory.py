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
    num_shares: int = 1  # devices that hold a share of the weights each

    def __str__(self) -> str:
        names: dict[bool | str, str] = {False: "kept", True: "recomputed"}
        kept = names.get(self.activation_checkpointing, self.activation_checkpointing)
        on_host = min(self.blocks_to_swap, self.num_blocks)
        blocks = f"{on_host} of {self.num_blocks} blocks in host memory"
        shares = f" divided among {self.num_shares} devices" if self.num_shares > 1 else ""
        return f"{self.dtype} weights{shares}, {blocks}, activations: {kept}"

    @property
    def uses_host(self) -> bool:
        """Whether it is host memory that may have run out."""
        return self.blocks_to_swap > 0 or POLICIES[self.activation_checkpointing].on_host > 0

    def remedies(self, *, loading: bool) -> list[str]:
        """What to change next, from what costs the least time to what costs the most."""
        if loading:
            return [*_next_weights(self), "lower [adapter] rank"]
        return _next_activations(self) or _next_weights(self)


class FullPlan(NamedTuple):
    """The same without an adapter, when all weights train; bytes are those of one device."""

    weights: str  # "float32" or "bfloat16"
    rounding: str | None  # of bfloat16 weights
    offload_optimizer: bool
    accumulates: bool  # over micro-batches
    activation_checkpointing: bool | str
    micro_batch: int
    num_parameters: int
    weight_bytes: int
    gradient_bytes: int  # in the dtype that the model computes in
    state_bytes: int  # of the optimizer
    num_shares: int = 1  # devices that hold a share of all this each

    @property
    def device_bytes(self) -> int:
        """What lies on the device throughout, and the gradients; activations come on top."""
        state = 0 if self.offload_optimizer else self.state_bytes
        return self.weight_bytes + self.gradient_bytes + self.accumulator_bytes + state

    @property
    def accumulator_bytes(self) -> int:
        """Of the float32 sum of the micro-batches' gradients."""
        return 4 * self.num_parameters // self.num_shares if self.accumulates else 0

    def __str__(self) -> str:
        rounding = f" ({self.rounding} rounding)" if self.rounding else ""
        summed = f", their sum {_gb(self.accumulator_bytes)}" if self.accumulates else ""
        where = " in host memory" if self.offload_optimizer else ""
        shares = f", divided among {self.num_shares} devices" if self.num_shares > 1 else ""
        return (
            f"{self.num_parameters:,} weights train{shares}: {self.weights} weights{rounding} "
            f"{_gb(self.weight_bytes)}, gradients {_gb(self.gradient_bytes)}{summed}, optimizer "
            f"state {_gb(self.state_bytes)}{where}; {_gb(self.device_bytes)} on a device, "
            "activations on top"
        )

    @property
    def uses_host(self) -> bool:
        """Whether it is host memory that may have run out."""
        return self.offload_optimizer

    def remedies(self, *, loading: bool) -> list[str]:
        """What to change next, from what costs the least time to what costs the most."""
        if not loading and self.activation_checkpointing is not True:
            return ["set activation_checkpointing = true"]
        if not self.offload_optimizer:
            return ["set [full] offload_optimizer = true"]
        if self.weights == "float32":
            return ["set [full] weights = 'bfloat16'"]
        if self.accumulates:
            return [
                "set gradient_accumulation_steps = 1, or global_batch_size to what the GPUs take "
                "at once, which needs no sum of gradients"
            ]
        return ["train a LoRA: add [adapter] type = 'lora'"]


@contextmanager
def explain_exhaustion(plan: MemoryPlan | FullPlan, bucket: Bucket | None = None) -> Iterator[None]:
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
            remedies = plan.remedies(loading=True)
            where = "loading the model"
        else:
            remedies = [
                *plan.remedies(loading=False),
                *(["lower micro_batch_size_per_gpu"] if plan.micro_batch > 1 else []),
                "train on smaller resolutions or frame_buckets",
            ]
            where = f"at {bucket} ({bucket.num_tokens} tokens a clip)"
        what = "GPU memory, or pinned host memory," if plan.uses_host else "GPU memory"
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


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
