"""Where does the device's time go? A table of kernels from a profile that JAX wrote.

The train step's benchmark writes one and prints its table; this prints it again:

    python benchmarks/kernel_table.py profile --steps 2
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

# Of the classes whose pattern is found in a kernel's name, the first counts. cuDNN does nothing
# but attention in this step.
CLASSES = (
    ("copies to, from and on the device", re.compile(r"^mem(cpy|set)", re.IGNORECASE)),
    ("attention", re.compile(r"sdpa|flash|fmha|attention|cudnn", re.IGNORECASE)),
    ("matmul", re.compile(r"gemm|cublas|nvjet|cutlass|wgmma|matmul|splitk|gemv|_dot", re.I)),
    ("transpose, slice, copy", re.compile(r"transpose|slice|copy|concatenate|pad_|gather", re.I)),
    ("other", re.compile("")),
)


class Kernel(NamedTuple):
    """One execution of a kernel, or one copy, on a stream of the device."""

    name: str
    start_ns: float
    duration_ns: float


def read_kernels(folder: Path) -> list[Kernel]:
    """Reads the newest profile under a folder; SystemExit if it holds no device stream.

    Without a GPU it takes what XLA ran on host threads, which is good to check the program only.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise SystemExit(f"{folder}: no profile (*.xplane.pb) in it")
    lines = [
        (plane.name, line)
        for plane in ProfileData.from_file(str(files[-1])).planes
        for line in plane.lines
    ]
    streams = [line for plane, line in lines if "/device:GPU" in plane and "Stream" in line.name]
    if not any("/device:GPU" in plane for plane, _ in lines):
        streams = [line for _, line in lines if line.name.startswith("tf_XLA")]
    kernels = [
        Kernel(event.name, event.start_ns, event.duration_ns)
        for line in streams
        for event in line.events
        if event.duration_ns > 0
    ]
    if not kernels:
        found = ", ".join(f"{plane} / {line.name}" for plane, line in lines)
        raise SystemExit(f"{files[-1]}: no stream of a GPU in it, only {found}")
    return kernels


def format_kernels(kernels: Sequence[Kernel], *, num_steps: int, num_rows: int = 40) -> str:
    """Formats the kernels that take most time, the sum of each class and the busy share."""
    span_ns = max(k.start_ns + k.duration_ns for k in kernels) - min(k.start_ns for k in kernels)
    total_ns = sum(kernel.duration_ns for kernel in kernels)

    def row(name: str, group: list[Kernel]) -> str:
        time_ns = sum(kernel.duration_ns for kernel in group)
        return (
            f"{time_ns / num_steps / 1e6:10.3f} {len(group) / num_steps:8.1f} "
            f"{time_ns / len(group) / 1e3:10.1f} {time_ns / total_ns:6.1%}  {name[:110]}"
        )

    title = f"{'ms/step':>10} {'count':>8} {'avg us':>10} {'share':>6}  "
    by_name = group_kernels(kernels, short_name)
    by_class = group_kernels(kernels, classify)
    computing = [kernel for kernel in kernels if classify(kernel.name) != CLASSES[0][0]]
    return "\n".join(
        [
            f"{title}kernel ({min(num_rows, len(by_name))} of {len(by_name)})",
            *(row(name, group) for name, group in by_name[:num_rows]),
            f"{title}class",
            *(row(name, group) for name, group in by_class),
            f"{total_ns / num_steps / 1e6:10.3f} ms/step in all, in a span of "
            f"{span_ns / num_steps / 1e6:.3f} ms/step; busy {busy_ns(kernels) / span_ns:.1%} of it,"
            f" {busy_ns(computing) / span_ns:.1%} without copies",
        ]
    )


def group_kernels(
    kernels: Iterable[Kernel], key: Callable[[str], str]
) -> list[tuple[str, list[Kernel]]]:
    """Groups kernels by what ``key`` makes of their name; the group with most time comes first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel.name), []).append(kernel)
    return sorted(groups.items(), key=lambda item: -sum(k.duration_ns for k in item[1]))


def short_name(name: str) -> str:
    """Strips the numbers that XLA appends, so that fusion.3 and fusion_12 are one."""
    return re.sub(r"([._]\d+)+$", "", name) or name


def classify(name: str) -> str:
    """Names the class of a kernel."""
    return next(label for label, pattern in CLASSES if pattern.search(name))


def busy_ns(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one of the kernels runs."""
    busy = end = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        stop = kernel.start_ns + kernel.duration_ns
        busy += max(0.0, stop - max(end, kernel.start_ns))
        end = max(end, stop)
    return busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2, help="train steps in the profile")
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    print(format_kernels(read_kernels(args.folder), num_steps=args.steps, num_rows=args.rows))


if __name__ == "__main__":
    main()
