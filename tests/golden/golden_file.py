"""What every make_*.py does with the arrays that it computed: write them, or check the file."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

TOLERANCE = 1e-6  # of the largest value of an array: other builds of PyTorch may round otherwise


def write_or_check(path: Path, arrays: Mapping[str, np.ndarray], *, about: str | None) -> int:
    """Writes the file, or with --check compares it; returns the exit code."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        np.savez_compressed(path, **arrays)
        return 0
    faults = find_faults(path, arrays)
    sys.stdout.writelines(f"{path.name}: {fault}\n" for fault in faults or ["is as computed"])
    return int(bool(faults))


def find_faults(path: Path, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Returns what differs from the committed file, one line each."""
    with np.load(path) as file:
        stored = dict(file)
    if stored.keys() != arrays.keys():
        return [f"names differ: {sorted(stored.keys() ^ arrays.keys())}"]
    faults = []
    for name, array in arrays.items():
        old, new = stored[name].astype(np.float64), array.astype(np.float64)
        if old.shape != new.shape:
            faults.append(f"{name}: {old.shape} committed, {new.shape} computed")
        elif not np.abs(old - new).max() <= TOLERANCE * np.abs(new).max():
            faults.append(f"{name}: off by {np.abs(old - new).max() / np.abs(new).max():.2g}")
    return faults
