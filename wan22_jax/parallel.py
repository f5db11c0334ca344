"""Among how many devices is what divided? The ``[parallel]`` table, and what it leaves open."""

import math
from typing import NamedTuple

from pydantic import Field, PrivateAttr

from wan22_jax.errors import BadInput
from wan22_jax.model.remat import POLICIES
from wan22_jax.sharding import Split
from wan22_jax.toml_file import Table

_SHARE = 0.9  # of a device's memory that may be planned with
# Bytes of a token while one block runs and its gradient is taken, in units of the model's width
# (27,280 tokens take 5.8 GB beside the weights, RESULTS.md); of what a policy keeps of each block,
# how many times the width that is. The feed-forward's own width comes from the config.
_WORKING = 70
_WIDTHS = {"attention": 1, "qkv": 3, "o": 1, "cross_q": 1, "rotated": 2} | {
    "cross_attention": 1,
    "cross_o": 1,
}
_EVERYTHING = 25


class ParallelConfig(Table):
    """What is divided among GPUs; their product is the number of GPUs of all hosts together.

    ``data``: examples. ``fsdp``: examples, and the rows of the model's matrices, the gradients and
    the optimizer's state of these. ``context``: the tokens of each clip. What is not set is chosen:
    see ``choose_split``.
    """

    data: int | None = Field(default=None, ge=1)
    fsdp: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=1)
    _chosen: Split | None = PrivateAttr(None)

    @property
    def split(self) -> Split:
        """What was chosen; before that, what is asked for, of one device if nothing is."""
        return self._chosen or Split(self.data or 1, self.fsdp or 1, self.context or 1)

    def fix(self, split: Split) -> "ParallelConfig":
        """Returns the same table, as asked for, of which this split was made."""
        fixed = self.model_copy()
        fixed._chosen = split
        return fixed


class Workload(NamedTuple):
    """What decides whether a device's memory suffices."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    trains_all: bool
    state_bytes: int  # weights, and what trains all of them
    activation_checkpointing: bool | str
    num_tokens: int  # of the largest micro-batch of a device

    def activation_bytes(self) -> int:
        """Of one device that has whole clips, about."""
        remat = POLICIES[self.activation_checkpointing]
        widths = _WIDTHS | {"ffn_in": self.ffn_dim / self.dim}
        kept = _EVERYTHING
        if remat.keep is not None:
            kept = 1 + sum(widths.get(name, 0) for name in remat.keep)
        per_layer = 2 * kept * (1 - float(remat.on_host))
        return int(self.num_tokens * self.dim * (_WORKING + self.num_layers * per_layer))


def choose_split(
    wanted: ParallelConfig, work: Workload, *, num_devices: int, memory_bytes: int | None
) -> tuple[Split, str]:
    """Decides what the table leaves open.

    By default a LoRA's frozen weights are on every device and examples are divided; weights that
    all train are divided too (fsdp), unless without activation checkpointing. A model that leaves
    too little memory is divided as far as it has to be, and so are the tokens of clips that do not
    fit. What ``data`` leaves where it is set goes to the tokens.

    Args:
        wanted: the table.
        work: see there.
        num_devices: of all processes.
        memory_bytes: of one device; None where there is no limit to be known.

    Returns:
        The split and a sentence that says why.

    Raises:
        BadInput: the devices do not divide so, or the model does not.
    """
    named = {name: value for name, value in wanted.model_dump().items() if value is not None}
    text = ", ".join(f"{name} = {value}" for name, value in named.items())
    given = math.prod(named.values())
    if num_devices % given or (len(named) == 3 and given != num_devices):
        raise BadInput(
            f"[parallel] {text}: {given} devices, of {num_devices}; set numbers whose product is "
            "that, leave one of them out, or show fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    rest, reasons = num_devices // given, []
    memory = math.inf if memory_bytes is None else memory_bytes * _SHARE
    fsdp, context, data = wanted.fsdp, wanted.context, wanted.data
    if fsdp is None:
        ways = _divisors(rest, of=math.gcd(work.dim, work.ffn_dim))
        takes_rest = data is not None and context is not None
        if takes_rest or (work.trains_all and work.activation_checkpointing is not False):
            fsdp = ways[-1]
        else:
            fsdp = next((n for n in ways if work.state_bytes / n <= 0.6 * memory), ways[-1])
            reasons += ["the model leaves too little memory on one device"] * (fsdp > 1)
        rest //= fsdp
    if context is None:
        ways = _divisors(rest, of=work.num_heads)
        room = memory - work.state_bytes / fsdp
        needed = work.activation_bytes()
        context = next((n for n in ways if needed / n <= room), ways[-1])
        reasons += [f"{work.num_tokens:,} tokens do not fit one device"] * (context > 1)
        if data is not None:
            context = ways[-1]
        rest //= context
    data = rest if data is None else data
    split = Split(data, fsdp, context)
    if split.num_devices != num_devices:
        raise BadInput(
            f"[parallel] {text}: leaves {num_devices // split.num_devices} devices for each of "
            f"{split.num_devices}, and this model does not divide among more; leave data out"
        )
    _check(split, work)
    return split, "; ".join(reasons)


def _check(split: Split, work: Workload) -> None:
    if work.num_heads % split.context:
        ways = ", ".join(map(str, _divisors(work.num_heads, of=work.num_heads)))
        raise BadInput(
            f"[parallel] context = {split.context}: {work.num_heads} attention heads do not divide "
            f"so; choose one of {ways}"
        )
    for size in (work.dim, work.ffn_dim):
        if size % split.fsdp:
            raise BadInput(
                f"[parallel] fsdp = {split.fsdp}: matrices of {size} rows do not divide so; choose "
                "a power of two, and give data the rest"
            )
    if split.fsdp > 1 and work.activation_checkpointing is False:
        raise BadInput(
            f"[parallel] fsdp = {split.fsdp} with activation_checkpointing = false: what a device "
            "gathers of the others would be kept of all blocks; set activation_checkpointing = true"
        )


def _divisors(number: int, *, of: int) -> list[int]:
    """Common divisors of both, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0 and of % n == 0]
