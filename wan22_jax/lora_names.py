"""Under which names do the files of each maker hold the matrices of a LoRA?

We write three dialects, one tensor per layer::

    comfyui    diffusion_model.blocks.0.self_attn.q.lora_A.weight    and ....alpha where it is not
               the rank; diffusion-pipe and ai-toolkit write these names too
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight         ranks and alphas in the header
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight       and ....alpha, always; musubi

lora_A (lora_down) is [rank, in], lora_B (lora_up) [out, rank], alpha a number; without any, alpha
is the rank. Spelling and reading a name are a bijection. Read are also: the dotted names with the
prefix ``base_model.model.`` of PEFT (ranks and alphas in ``adapter_config.json`` beside the file)
or none, with lora_down and lora_up, and with ``.default.weight``. One file spells all of its names
alike, or it is refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from wan22_jax.adapter_targets import TARGETS
from wan22_jax.weights import transformer_names

Dialect = Literal["comfyui", "diffusers", "kohya"]
Kind = Literal["lora_A", "lora_B", "alpha"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
PEFT_HEADER = "lora_adapter_metadata"  # Diffusers' key in the header of a file
PEFT_PREFIX = "base_model.model."


class Entry(NamedTuple):
    """What a name stands for."""

    layer: int
    target: str  # "self_attn.q"
    kind: Kind


class Spelling(NamedTuple):
    """What the names of one file have in common; ``sides`` and ``end`` are None of an alpha."""

    prefix: str
    naming: str  # of the linears: "official", "diffusers" or "kohya"
    sides: str | None  # "AB" or "down-up"
    end: str | None

    def module(self, target: str, layer: int) -> str:
        """The linear as PEFT's config names it: without prefix."""
        spelled = _DIFFUSERS[target] if self.naming == "diffusers" else target
        return f"blocks.{layer}.{spelled}"

    def agrees(self, other: "Spelling") -> bool:
        """Whether one file may hold names of both."""
        return all(a is None or b is None or a == b for a, b in zip(self, other, strict=True))

    def join(self, other: "Spelling") -> "Spelling":
        """What both say together."""
        return self._replace(sides=self.sides or other.sides, end=self.end or other.end)


def spell_name(dialect: Dialect, entry: Entry) -> str:
    """Returns the name that we write; an alpha has none in Diffusers' dialect (KeyError)."""
    layer, target, kind = entry
    if dialect == "kohya":
        return f"lora_unet_blocks_{layer}_{_KOHYA[target]}.{_KOHYA_KINDS[kind]}"
    if dialect == "diffusers":
        return f"transformer.blocks.{layer}.{_DIFFUSERS[target]}.{_MATRICES[kind]}"
    return f"diffusion_model.blocks.{layer}.{target}.{_KINDS[kind]}"


def read_name(name: str) -> tuple[Entry, Spelling] | None:
    """Says what a name of any maker stands for and how it is spelled; None if it is not known."""
    for naming, pattern, target_of in _PATTERNS:
        if match := pattern.fullmatch(name):
            side, end = match["side"], match["end"]
            kind = _READ_KINDS.get(side, "alpha")
            sides = None if side is None else "AB" if side == kind else "down-up"
            entry = Entry(int(match["layer"]), target_of[match["target"]], kind)
            return entry, Spelling(match["prefix"], naming, sides, end)
    return None


def describe_peft(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Says rank and alpha of each target in the words of PEFT's LoraConfig."""
    rank, alpha = (Counter(sizes.values()).most_common(1)[0][0] for sizes in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": [_DIFFUSERS[target] for target in ranks],
        "rank_pattern": {_DIFFUSERS[t]: own for t, own in ranks.items() if own != rank},
        "alpha_pattern": {_DIFFUSERS[t]: _number(own) for t, own in alphas.items() if own != alpha},
    }


def write_peft_header(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
    """Returns what Diffusers reads at PEFT_HEADER."""
    described = describe_peft(ranks, alphas)
    return json.dumps({f"transformer.{key}": value for key, value in described.items()})


def read_peft_header(header: str) -> dict[str, Any]:
    """Reads it back; ValueError if it is not a JSON object."""
    try:
        fields = json.loads(header)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return {key.removeprefix("transformer."): value for key, value in fields.items()}


def find_peft_alpha(fields: Mapping[str, Any], module: str, *, rank: int) -> float:
    """Returns the alpha that PEFT's LoraConfig gives to a linear.

    Args:
        fields: those of the config.
        module: the linear, e.g. "blocks.0.attn1.to_q".
        rank: as its matrices have it.

    Raises:
        ValueError: the config is of another rank, or lacks one.
    """
    try:
        stated = _match(fields.get("rank_pattern") or {}, module, fields["r"])
        alpha = float(_match(fields.get("alpha_pattern") or {}, module, fields["lora_alpha"]))
    except (KeyError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise ValueError(f"r and lora_alpha expected ({error!r})") from None
    if stated != rank:
        raise ValueError(f"rank {stated} stated for {module}, its matrices have {rank}")
    return alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first key that fits, as PEFT compares them."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _to_diffusers(target: str) -> str:
    name = transformer_names().to_diffusers(f"blocks.0.{target}.weight")
    return name.removeprefix("blocks.0.").removesuffix(".weight")


_DIFFUSERS = {target: _to_diffusers(target) for target in TARGETS}
_KOHYA = {target: target.replace(".", "_") for target in TARGETS}
_MATRICES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_KINDS = {**_MATRICES, "alpha": "alpha"}
_KOHYA_KINDS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "alpha": "alpha"}
_READ_KINDS: dict[str, Kind] = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_down": "lora_A",
    "lora_up": "lora_B",
}
_LAYER = "(?P<layer>0|[1-9][0-9]?)"


_SIDE = r"\.(?:(?P<side>{sides})(?P<end>{end}\.weight)|alpha)"


def _dotted(prefixes: Iterable[str], targets: Iterable[str]) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<prefix>{'|'.join(map(re.escape, prefixes))})blocks\.{_LAYER}\."
        + f"(?P<target>{'|'.join(map(re.escape, targets))})"
        + _SIDE.format(sides="lora_A|lora_B|lora_down|lora_up", end=r"(?:\.default)?")
    )


_PREFIXES = ("transformer.", PEFT_PREFIX, "")
_PATTERNS: tuple[tuple[str, re.Pattern[str], dict[str, str]], ...] = (
    (
        "official",
        _dotted(("diffusion_model.", *_PREFIXES), TARGETS),
        {target: target for target in TARGETS},
    ),
    (
        "diffusers",
        _dotted(_PREFIXES, _DIFFUSERS.values()),
        {spelled: target for target, spelled in _DIFFUSERS.items()},
    ),
    (
        "kohya",
        re.compile(
            rf"(?P<prefix>lora_unet_)blocks_{_LAYER}_(?P<target>{'|'.join(_KOHYA.values())})"
            + _SIDE.format(sides="lora_down|lora_up", end="")
        ),
        {spelled: target for target, spelled in _KOHYA.items()},
    ),
)
