"""What do several LoRAs do together, each with a strength of its own?"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wan22_jax.adapter import Adapter, describe_sizes
from wan22_jax.errors import BadInput


def parse_lora(word: str) -> tuple[Path, float]:
    """Reads FILE[:STRENGTH]; a strength is 1 if it is left out.

    Raises:
        BadInput: the strength is not finite.
    """
    path, colon, strength = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        value = float(strength)
    except ValueError:
        return Path(word), 1.0
    if not math.isfinite(value):
        raise BadInput(f"--lora {word}: a strength is a number, got {strength}")
    return Path(path), value


def join_loras(adapters: Sequence[tuple[Adapter, float]], *, source: str) -> Adapter:
    """Makes one LoRA that does what several do together, each with its strength; ranks add up.

    Raises:
        BadInput: two have other shapes, or were trained on other base models.
    """
    matrices, alphas = {}, {}
    targets = dict.fromkeys(name for adapter, _ in adapters for name in adapter.alphas)
    for target in targets:
        own = [(adapter, strength) for adapter, strength in adapters if target in adapter.alphas]
        name_a, name_b = f"blocks.{target}.lora_A", f"blocks.{target}.lora_B"
        parts_a = [adapter.matrices[name_a].astype(np.float32) for adapter, _ in own]
        parts_b = [_scale(adapter, target, strength) for adapter, strength in own]
        for name, parts, axis in ((name_a, parts_a, 1), (name_b, parts_b, 2)):
            others = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
            if len(others) > 1:
                names = " and ".join(adapter.source for adapter, _ in own)
                shapes = " and ".join(str(list(part.shape)) for part in parts)
                raise BadInput(f"{names}: are LoRAs of two models ({name} is {shapes})")
            matrices[name] = np.concatenate(parts, axis=axis)
        alphas[target] = float(matrices[name_a].shape[1])
    digests = {
        adapter.metadata["base_digest"]
        for adapter, _ in adapters
        if "base_digest" in adapter.metadata
    }
    if len(digests) > 1:
        names = ", ".join(adapter.source for adapter, _ in adapters)
        raise BadInput(f"{names}: were trained on {len(digests)} base models; join those of one")
    metadata = {"format": "pt"}
    if digests:
        metadata["base_digest"] = digests.pop()
    return describe(Adapter(matrices, alphas, metadata, source))


def describe(adapter: Adapter) -> Adapter:
    """Brings rank, alpha and targets of the header up to date."""
    metadata = {"format": "pt"} | adapter.metadata | describe_sizes(adapter)
    return replace(adapter, metadata=metadata)


def _scale(adapter: Adapter, target: str, strength: float) -> np.ndarray:
    """B times all that is between it and what it adds to the weights, float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.float32(strength * adapter.scale(target))
        scaled = factor * adapter.matrices[f"blocks.{target}.lora_B"].astype(np.float32)
    if not np.isfinite(scaled).all():
        raise BadInput(
            f"{adapter.source}: a strength of {strength:g} takes its numbers beyond float32; "
            "choose one nearer to 1"
        )
    return scaled
