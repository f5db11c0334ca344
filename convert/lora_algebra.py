"""What can be done with LoRAs as matrices: joined, cut to a lower rank, found between two models?

All of it is done in float64 or float32 on the host, layer by layer. A result has alpha = rank, that
is a scale of 1, which is part of B (and of A) instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from wan22_jax.adapter import Adapter, describe_sizes
from wan22_jax.errors import BadInput
from wan22_jax.model_tensors import Tensors, count_layers, read_float32, stacked_weight_shapes

_OVERSAMPLING = 16  # columns beyond the rank that the range finder looks for
_POWER_STEPS = 4
_SEED = 22


class Cut(NamedTuple):
    """How much of a target is left in a low rank: of all layers, in squares (energy)."""

    rank: int
    energy: float  # of what is kept
    total: float

    @property
    def kept(self) -> float:
        """The share of the energy that is kept, 1 of nothing."""
        return self.energy / self.total if self.total else 1.0

    @property
    def error(self) -> float:
        """The norm of what is lost in proportion to that of the whole."""
        return float(np.sqrt(max(1.0 - self.kept, 0.0)))


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


def cut_lora(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, Cut]]:
    """Cuts a LoRA to a lower rank; what is kept is the best possible of that rank.

    Args:
        adapter: of any ranks.
        rank: the highest rank of a target.
        energy: instead, the share of the squared norm that every layer is to keep; each target
            gets the rank that it needs.

    Returns:
        The LoRA, float32, and how much of each target is left.
    """
    matrices, alphas, cuts = {}, {}, {}
    for target in adapter.alphas:
        name_a, name_b = f"blocks.{target}.lora_A", f"blocks.{target}.lora_B"
        parts = [
            _decompose(adapter.scale(target) * b, a)
            for a, b in zip(
                adapter.matrices[name_a].astype(np.float64),
                adapter.matrices[name_b].astype(np.float64),
                strict=True,
            )
        ]
        squares = np.array([sizes**2 for _, sizes, _ in parts])  # [layers, rank]
        kept = min(rank or squares.shape[1], squares.shape[1])  # a rank beyond the sides is none
        if energy is not None:
            kept = max(_count_needed(layer, energy) for layer in squares)
        matrices[name_a], matrices[name_b] = _stack(parts, kept)
        alphas[target] = float(kept)
        cuts[target] = Cut(kept, float(squares[:, :kept].sum()), float(squares.sum()))
    return describe(replace(adapter, matrices=matrices, alphas=alphas)), cuts


def extract_lora(
    base: Tensors, tuned: Tensors, *, rank: int, source: str
) -> tuple[Adapter, dict[str, Cut], list[str]]:
    """Finds the LoRA of a rank that is nearest to the difference of two models.

    Small differences are decomposed exactly. Large ones by a randomised range finder (Halko et al.
    2011) with ``_OVERSAMPLING`` more columns than the rank and ``_POWER_STEPS`` power iterations;
    how much it keeps is exact all the same, since it projects.

    Args:
        base: the one.
        tuned: the other, of the same shapes.
        rank: of the LoRA.
        source: for messages.

    Returns:
        The LoRA, float32, how much of each target it holds, and the names of other tensors that
        differ, which no LoRA holds. Targets without any difference are left out.

    Raises:
        BadInput: the rank is more than the matrices have, or there is no difference.
    """
    num_layers = count_layers(base)
    matrices, alphas, cuts = {}, {}, {}
    shapes = stacked_weight_shapes(base)
    for target, (_, *sides) in shapes.items():
        if rank > min(sides):
            raise BadInput(f"--rank {rank}: {target} is {sides}; choose at most {min(sides)}")
        parts, energy, total = [], 0.0, 0.0
        for layer in range(num_layers):
            name = f"blocks.{layer}.{target}.weight"
            delta = read_float32(tuned, name) - read_float32(base, name)
            parts.append(_truncate(delta, rank))
            total += float(np.sum(np.square(delta, dtype=np.float64)))
            energy += float(np.sum(np.square(parts[-1][1][:rank], dtype=np.float64)))
        if total == 0:
            continue
        name_a, name_b = f"blocks.{target}.lora_A", f"blocks.{target}.lora_B"
        matrices[name_a], matrices[name_b] = _stack(parts, rank)
        alphas[target], cuts[target] = float(rank), Cut(rank, energy, total)
    if not matrices:
        raise BadInput(f"{source}: the linears of the two models are the same; nothing to extract")
    linears = {f"blocks.{n}.{target}.weight" for target in shapes for n in range(num_layers)}
    left_out = [
        name
        for name in base.shapes
        if name not in linears and not np.array_equal(base.read(name), tuned.read(name))
    ]
    return describe(Adapter(matrices, alphas, {"format": "pt"}, source)), cuts, left_out


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


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # U [out, R], singular values [R], V^T [R, in]


def _decompose(matrix_b: np.ndarray, matrix_a: np.ndarray) -> _Parts:
    """The singular values of B A, by those of a matrix of the rank's size."""
    basis_out, core_b = np.linalg.qr(matrix_b)
    basis_in, core_a = np.linalg.qr(matrix_a.T)
    left, sizes, right = np.linalg.svd(core_b @ core_a.T)
    return basis_out @ left, sizes, right @ basis_in.T


def _truncate(delta: np.ndarray, rank: int) -> _Parts:
    columns = rank + _OVERSAMPLING
    if min(delta.shape) <= 4 * columns:
        return np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    rng = np.random.default_rng(_SEED)
    basis, _ = np.linalg.qr(delta @ rng.standard_normal((delta.shape[1], columns), np.float32))
    for _ in range(_POWER_STEPS):
        basis, _ = np.linalg.qr(delta.T @ basis)
        basis, _ = np.linalg.qr(delta @ basis)
    left, sizes, right = np.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ left, sizes, right


def _count_needed(squares: np.ndarray, energy: float) -> int:
    """How many of the largest keep this share of their sum."""
    total = squares.sum()
    if total == 0:
        return 1
    return int(np.searchsorted(np.cumsum(squares) / total, energy - 1e-12) + 1)


def _stack(parts: Sequence[_Parts], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [N, rank, in] and B [N, out, rank]; each has the root of the singular values."""
    matrices_a = [np.sqrt(sizes[:rank, None]) * right[:rank] for _, sizes, right in parts]
    matrices_b = [left[:, :rank] * np.sqrt(sizes[:rank]) for left, sizes, _ in parts]
    return np.stack(matrices_a).astype(np.float32), np.stack(matrices_b).astype(np.float32)
