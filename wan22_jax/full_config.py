"""The ``[full]`` table: how do all weights train, and what does not go together with that?"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from wan22_jax.model.remat import POLICIES


class FullConfig(BaseModel):
    """How all weights train where there is no ``[adapter]``; the table may be left out.

    ``weights`` is what they are kept in between steps; the model computes in ``[model] dtype``.
    ``rounding`` is that of bfloat16 weights, 'stochastic' if it is not set; see
    ``training/rounding.py``. ``offload_optimizer`` keeps the optimizer's state in host memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weights: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["stochastic", "kahan"] | None = None
    offload_optimizer: bool = False

    @property
    def weight_rounding(self) -> Literal["stochastic", "kahan"] | None:
        """How weights are rounded after a step; None where they are float32."""
        return (self.rounding or "stochastic") if self.weights == "bfloat16" else None


def find_fault(
    full: FullConfig | None,
    *,
    has_adapter: bool,
    model_dtype: str,
    transformer_dtype: str | None,
    blocks_to_swap: int,
    activation_checkpointing: bool | str,
    optimizer: str,
    skip_nonfinite_steps: bool,
) -> str | None:
    """Says what of a config does not go together with training all weights, None if all does.

    Args:
        full: the table, None if it was left out.
        has_adapter: whether a few weights train instead.
        model_dtype: ``[model] dtype``.
        transformer_dtype: ``[model] transformer_dtype``.
        blocks_to_swap: see ``TrainConfig``.
        activation_checkpointing: a key of ``remat.POLICIES``.
        optimizer: ``[optimizer] type``.
        skip_nonfinite_steps: see ``TrainConfig``.
    """
    if has_adapter:
        return full and "[full] trains all weights, [adapter] a few; remove one of them"
    full = full or FullConfig()
    faults = {
        f"transformer_dtype = {transformer_dtype!r} is that of frozen weights, and none are; "
        "choose [full] weights": transformer_dtype is not None,
        f"blocks_to_swap = {blocks_to_swap} moves frozen weights, and none are; "
        "set [full] offload_optimizer = true": blocks_to_swap > 0,
        f"activation_checkpointing = {activation_checkpointing!r} keeps activations in host "
        "memory, which needs frozen weights; use true": bool(
            POLICIES[activation_checkpointing].on_host
        ),
        "[full] weights = 'bfloat16' needs [model] dtype = 'bfloat16'": full.weights == "bfloat16"
        and model_dtype != "bfloat16",
        "[full] rounding is that of bfloat16 weights; leave it out, or set [full] weights = "
        "'bfloat16'": full.weights == "float32" and full.rounding is not None,
        f"[optimizer] type = {optimizer!r} measures all weights at once, and they train block by "
        "block; use another one, or add [adapter] type = 'lora'": optimizer.lower().startswith(
            ("prodigy", "schedule")
        ),
        "skip_nonfinite_steps would keep the weights before and after a step; leave it out": (
            skip_nonfinite_steps
        ),
    }
    for fault, is_there in faults.items():
        if is_there:
            return f"without [adapter] all weights train: {fault}"
    return None
