"""What [parallel] leaves open, and what it cannot mean."""

import pytest

from wan22_jax.errors import BadInput
from wan22_jax.parallel import ParallelConfig, Workload, choose_split
from wan22_jax.sharding import Split

GB = 10**9
ADAPTER = Workload(
    dim=3072,
    ffn_dim=14336,
    num_heads=24,
    num_layers=30,
    trains_all=False,
    state_bytes=10 * GB,
    activation_checkpointing=True,
    num_tokens=27280,
)
FULL = ADAPTER._replace(trains_all=True, state_bytes=80 * GB)
NO_CHECKPOINTS = {"activation_checkpointing": False, "num_tokens": 1000}


def choose(
    num_devices: int, work: Workload = ADAPTER, *, memory: int | None = 80 * GB, **wanted: int
) -> Split:
    split, _ = choose_split(
        ParallelConfig(**wanted), work, num_devices=num_devices, memory_bytes=memory
    )
    return split


def test_what_is_left_out_is_chosen():
    assert choose(8) == Split(8)
    assert choose(8, FULL) == Split(1, 8)
    assert choose(6, FULL) == Split(3, 2)  # 3 does not divide the matrices
    assert choose(8, memory=12 * GB) == Split(2, 2, 2)  # weights, then activations
    assert choose(4, ADAPTER._replace(activation_checkpointing=False)) == Split(1, 1, 4)
    assert choose(8, fsdp=2) == Split(4, 2)
    assert choose(8, context=4) == Split(2, 1, 4)
    # Weights that all train are kept whole if nothing is computed again, as long as they fit.
    small = FULL._replace(state_bytes=GB, **NO_CHECKPOINTS)
    assert choose(4, small) == Split(4)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"data": 2}, Split(2, 1, 4)),
        ({"data": 1}, Split(1, 1, 8)),
        ({"data": 2, "fsdp": 2}, Split(2, 2, 2)),
        ({"data": 1, "context": 2}, Split(1, 4, 2)),
        ({"data": 2, "fsdp": 2, "context": 2}, Split(2, 2, 2)),
    ],
)
def test_what_data_leaves_is_used(wanted, expected):
    assert choose(8, **wanted) == expected


@pytest.mark.parametrize(
    ("num_devices", "work", "wanted", "problem"),
    [
        (8, ADAPTER, {"data": 3}, "data = 3: 3 devices, of 8; set numbers whose product is that"),
        (4, ADAPTER, {"data": 4, "fsdp": 2}, "data = 4, fsdp = 2: 8 devices, of 4"),
        (8, ADAPTER, {"data": 2, "fsdp": 2, "context": 1}, "4 devices, of 8"),
        (5, ADAPTER, {"context": 5}, "context = 5: 24 attention heads .* 1, 2, 3, 4, 6, 8, 12, 24"),
        (3, ADAPTER, {"fsdp": 3}, "fsdp = 3: matrices of 14336 rows do not divide so"),
        (5, ADAPTER, {"data": 1}, "leaves 5 devices for each of 1, .* leave data out"),
        (2, FULL._replace(**NO_CHECKPOINTS), {}, "fsdp = 2 with .* set activation_checkpointing"),
        (2, ADAPTER._replace(**NO_CHECKPOINTS), {"fsdp": 2}, "fsdp = 2 with activation_check"),
    ],
)
def test_what_does_not_divide_is_refused(num_devices, work, wanted, problem):
    with pytest.raises(BadInput, match=problem):
        choose(num_devices, work, **wanted)
