"""Which linears of a block get a low-rank adapter, of which rank, alpha and learning rate?

Layers are stacked, so that a target is a linear of every block: "self_attn.q", not one of layer 3.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from wan22_jax.toml_file import Table

TARGETS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
_LAYERS = 30  # of TI2V-5B; a pattern that names layers has to mean them all


class TargetConfig(Table):
    """One ``[[adapter.targets]]``: what it does not set is that of ``[adapter]`` and ``lr``.

    ``pattern`` is a regular expression for the whole name, with or without ``blocks.<layer>.``;
    a linear belongs to the first table that fits.
    """

    pattern: str
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    lr: float | None = Field(None, gt=0)


class AdapterConfig(Table):
    """The ``[adapter]`` table. ``dtype`` is the one that wan22-export writes.

    The trained copy is float32 whatever ``dtype`` says: bfloat16 loses small updates. Its matmuls
    run in the model's dtype. ``exclude_modules`` is PEFT's: one regular expression for whole names,
    or a list of names or of their last parts. ``init_from_existing`` is a LoRA to start from.
    """

    type: Literal["lora", "lokr", "dora"] = "lora"
    rank: int = Field(32, ge=1)
    alpha: float | None = Field(None, gt=0)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[TargetConfig] = Field(default=[])
    exclude_modules: str | list[str] = Field(default=[])
    init_from_existing: str | None = None


class LoRATarget(NamedTuple):
    """The adapter of one linear; ``lr`` is None for that of the run."""

    rank: int
    alpha: float
    lr: float | None = None


def choose_targets(config: AdapterConfig) -> dict[str, LoRATarget]:
    """Returns the adapted linears by name, in the order of ``TARGETS``.

    Raises:
        ValueError: a pattern is not a regular expression, fits no linear or some layers only, or
            nothing is left.
    """
    excluded = _fits_any(config.exclude_modules)
    chosen: dict[str, LoRATarget] = {}
    for own in config.targets or [TargetConfig(pattern=".*", rank=None, alpha=None, lr=None)]:
        rank = own.rank or config.rank
        alpha = own.alpha or (config.alpha if own.rank is None else None) or rank
        for name in _fits(own.pattern, "targets pattern"):
            chosen.setdefault(name, LoRATarget(rank, float(alpha), own.lr))
    left = {name: chosen[name] for name in TARGETS if name in chosen and name not in excluded}
    if not left:
        raise ValueError("exclude_modules leaves no linear to train; exclude fewer")
    return left


def _fits_any(exclude: str | list[str]) -> set[str]:
    if isinstance(exclude, str):
        return set(_fits(exclude, "exclude_modules"))
    found = set()
    for part in exclude:
        fitting = {name for name in TARGETS if name == part or name.endswith(f".{part}")}
        if not fitting:
            raise ValueError(f"exclude_modules: {part!r} {_NO_LINEAR}")
        found |= fitting
    return found


_NO_LINEAR = f"is none of the linears of a block: {', '.join(TARGETS)}"


def _fits(pattern: str, what: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression ({error})") from None
    found = []
    for name in TARGETS:
        full = [bool(compiled.fullmatch(f"blocks.{layer}.{name}")) for layer in range(_LAYERS)]
        if any(full) and not all(full):
            raise ValueError(
                f"{what} {pattern!r} fits {name} in some blocks only; all are adapted alike, "
                r"write blocks\.\d+\. or leave that part out"
            )
        if full[0] or compiled.fullmatch(name):
            found.append(name)
    if not found:
        raise ValueError(f"{what} {pattern!r} {_NO_LINEAR}")
    return found


def lr_ratios(targets: dict[str, LoRATarget], lr: float) -> dict[str, float]:
    """By the path of a linear, its own learning rate in proportion to that of the run."""
    return {f"blocks.{name}": own.lr / lr for name, own in targets.items() if own.lr is not None}


def describe_targets(targets: dict[str, LoRATarget]) -> dict[str, list[Any]]:
    """What a checkpoint says of them: rank and alpha by name."""
    return {name: [own.rank, own.alpha] for name, own in targets.items()}


def trains_all(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run without adapter, in which all weights train."""
    return meta.get("targets", {}) is None


def parse_targets(meta: dict[str, Any], names: Sequence[str]) -> dict[str, LoRATarget]:
    """Reads it back; ``names`` are those of a checkpoint from before there was a choice."""
    if "targets" not in meta:
        return {name: LoRATarget(meta["rank"], float(meta["alpha"])) for name in names}
    targets = meta["targets"] or {}  # None where all weights trained
    return {name: LoRATarget(rank, float(alpha)) for name, (rank, alpha) in targets.items()}
