"""How does our train step compare with PyTorch's, on this GPU, in one session?

Runs each configuration of a table below in a process of its own, ours and the peers alike, and
prints a markdown table for RESULTS.md. Finished rows are appended to --results, so that a limit on
one command's time can be met in parts: the table is made of every row in that file.

    python benchmarks/compare.py                                   # the train step
    python benchmarks/compare.py --table batch                     # tokens a second against batch
    python benchmarks/compare.py --only '27280/*' --results rows.jsonl
    python benchmarks/compare.py --skip '27280/*' --results rows.jsonl
    python benchmarks/compare.py --tiny                            # does it run, on a CPU
"""

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
BUCKETS = {"27280": "1280x704x121", "8190": "832x480x81", "2304": "512x512x33"}
# activation_checkpointing that is fastest within the memory target (40, 20 and 14 GB in float8).
BEST_POLICY = {
    ("27280", "float8"): "offload_matmuls",
    ("8190", "float8"): "keep_qkv",
    ("2304", "float8"): "keep_matmuls",
    ("27280", "bfloat16"): "keep_attention",
    ("8190", "bfloat16"): "keep_attention",
    ("2304", "bfloat16"): "keep_attention",
}
# At 1280x704x121, by limit of the allocator in GB: the presets for 24 GB and for 12 GB.
SMALL_MEMORY = {
    "24": ("--activation_checkpointing", "offload_attention", "--blocks_to_swap", "0"),
    "10": ("--activation_checkpointing", "offload_attention", "--blocks_to_swap", "30"),
}
# The faster attention of the peer, by tokens; compiled, cuDNN's is the faster one everywhere.
PEER_EAGER_ATTENTION = {"27280": "_native_cudnn", "8190": "_native_cudnn", "2304": "native"}
BATCHES = {"512x512x33": (1, 2, 4, 8), "512x512x1": (1, 4, 16), "1024x1024x1": (1, 4, 16)}
PACKAGES = ("jax", "flax", "torch", "diffusers", "peft")

Row = dict[str, Any]


class Run(NamedTuple):
    """A child to start; the part of its name before the slash groups rows in the table."""

    name: str
    program: str
    arguments: tuple[str, ...]
    has_cache: bool = False  # start it twice, the second time with what the first has compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=("step", "batch"), default="step")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names to run")
    parser.add_argument("--skip", nargs="+", default=[], metavar="GLOB", help="names to leave out")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--results", type=Path, help="JSON lines; earlier rows are kept")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a child")
    parser.add_argument("--cold", action="store_true", help="leave out starts with a warm cache")
    parser.add_argument("--timeout_s", type=float, default=300, help="limit of a child")
    parser.add_argument("--commit", help="for the heading; left out, git is asked")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the program")
    args = parser.parse_args()
    every = list_steps() if args.table == "step" else list_batches()
    chosen = [
        run
        for run in every
        if any(fnmatch.fnmatch(run.name, glob) for glob in args.only)
        and not any(fnmatch.fnmatch(run.name, glob) for glob in args.skip)
    ]
    if args.list or not chosen:
        print("\n".join(run.name for run in (chosen or every)))
        sys.exit(0 if args.list else "no name matches --only and --skip; these exist")
    rows = read_rows(args.results)
    for run in chosen:
        rows[run.name] = measure(run, args)
        print(json.dumps(rows[run.name]), file=sys.stderr, flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(rows[run.name]) + "\n")
    ordered = [rows[run.name] for run in every if run.name in rows]
    print(describe_session(ordered, commit=args.commit, steps=args.steps))
    print(format_steps(ordered) if args.table == "step" else format_batches(ordered))


def list_steps() -> list[Run]:
    """The three shapes: ours in float8 and bfloat16, both peers; then small memory."""
    runs = []
    for tokens, bucket in BUCKETS.items():
        for dtype in ("float8", "bfloat16"):
            policy = ("--activation_checkpointing", BEST_POLICY[tokens, dtype])
            arguments = ("--bucket", bucket, "--dtype", dtype, *policy)
            has_cache = dtype == "float8"  # the other takes as long to compile
            runs.append(Run(f"{tokens}/{dtype}", "train_step.py", arguments, has_cache))
        peer = ("--bucket", bucket, "--attention")
        compiled = (*peer, "_native_cudnn", "--compile")
        eager = (*peer, PEER_EAGER_ATTENTION[tokens])
        runs.append(Run(f"{tokens}/peer_compiled", "peer_train_step.py", compiled))
        runs.append(Run(f"{tokens}/peer_eager", "peer_train_step.py", eager))
    for memory_gb, flags in SMALL_MEMORY.items():
        arguments = ("--bucket", BUCKETS["27280"], "--dtype", "float8", *flags)
        limit = ("--memory_gb", memory_gb)
        runs.append(Run(f"27280/{memory_gb}gb", "train_step.py", (*arguments, *limit)))
    return sorted(runs, key=lambda run: list(BUCKETS).index(run.name.partition("/")[0]))


def list_batches() -> list[Run]:
    """Short clips and images at growing batch, in both dtypes."""
    return [
        Run(
            f"{bucket}/{dtype}/{batch}",
            "train_step.py",
            (
                *("--bucket", bucket, "--dtype", dtype, "--batch", str(batch)),
                *("--activation_checkpointing", BEST_POLICY["2304", dtype]),
            ),
        )
        for bucket, batches in BATCHES.items()
        for dtype in ("float8", "bfloat16")
        for batch in batches
    ]


def measure(run: Run, args: argparse.Namespace) -> Row:
    """Runs a child; its row holds what it printed, or how it failed.

    With a cache its first step is still a cold one, and that of a second child is added to the row.
    """
    if args.cold or not run.has_cache:
        return _start(run, args, ("--steps", str(args.steps)))
    with tempfile.TemporaryDirectory() as folder:
        row = _start(run, args, ("--steps", str(args.steps), "--cache", folder))
        if "error" in row:
            return row
        again = _start(run, args, ("--steps", "1", "--cache", folder))
    if "error" not in again and not again["cached"]:
        again["error"] = "its step was not in the cache"
    key = "error" if "error" in again else "first_s"
    return row | {f"cached_{key}": again[key]}


def _start(run: Run, args: argparse.Namespace, more: Sequence[str]) -> Row:
    words = [sys.executable, str(FOLDER / run.program), *run.arguments, *more]
    if args.tiny:
        words += _tiny_words(run)
    path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        words,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a compiler's workers end with it
    )
    row: Row = {"name": run.name, "command": " ".join([run.program, *run.arguments])}
    try:
        said, _ = process.communicate(timeout=args.timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return row | {"error": f"took more than {args.timeout_s:g} s"}
    lines = said.splitlines()
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if process.returncode or not results:
        # The last line that is an error; XLA may print pages of memory statistics after it.
        errors = [line for line in lines if "rror" in line or "RESOURCE_EXHAUSTED" in line]
        last = (errors or [line for line in lines if line.strip()] or ["no output"])[-1]
        return row | {"error": f"exit {process.returncode}: {last.strip()[:300]}"}
    return row | json.loads(results[-1])


def _tiny_words(run: Run) -> list[str]:
    """Later flags win: a tiny bucket, no limit of a GPU's memory, attention that a CPU has."""
    words = ["--tiny", "--bucket", "64x64x5"]
    return words + (["--attention", "native"] if run.program.startswith("peer") else [])


def read_rows(file: Path | None) -> dict[str, Row]:
    """Reads the rows of earlier parts; the last one of a name counts."""
    if file is None or not file.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, file.read_text().splitlines())}


def describe_session(rows: Sequence[Row], *, commit: str | None, steps: int) -> str:
    """Says when, where and with what the rows were measured."""
    git = ("git", "-C", str(FOLDER.parent), "rev-parse", "--short", "HEAD")
    commit = commit or _output(git) or "not known"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _output(query).partition("\n")[0] or "none"
    devices = sorted({row["device"] for row in rows if "device" in row}) or ["none"]
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    warning = "" if len(devices) == 1 else "\nROWS OF SEVERAL DEVICES: their ratios mean nothing."
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return (
        f"{datetime.now(UTC):%Y-%m-%d} · commit {commit} · one {' / '.join(devices)}, driver "
        f"{driver} · Python {platform.python_version()}, {versions} · random weights of the 5B "
        f"sizes, LoRA rank 32; median of {steps} steps after the first, each row a process"
        f"{warning}\n\n    python benchmarks/{command}\n"
    )


def format_steps(rows: Sequence[Row]) -> str:
    """The markdown table of train steps; ratios are to the peers' rows of the same tokens.

    First steps count compiling: from nothing, and from what an earlier process has compiled.
    """
    lines = [
        "| tokens | program | s/step | compiled / this | eager / this | model TFLOP/s | peak GB "
        "| pinned host GB | first step s | with compilation cache |",
        "| --- " * 10 + "|",
    ]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        tokens, _, what = row["name"].partition("/")
        cells = [f"{int(tokens):,} ({BUCKETS[tokens]})", _describe(what, row)]
        if "error" in row:
            lines.append(_join([*cells, f"failed: {row['error']}", *[""] * 7]))
            continue
        peers = (by_name.get(f"{tokens}/peer_{kind}", {}) for kind in ("compiled", "eager"))
        ratios = [f"{p['step_s'] / row['step_s']:.2f}" if "step_s" in p else "" for p in peers]
        cells += [f"{row['step_s']:.3f}", *ratios, f"{row['model_tflops']:.0f}"]
        cells += [f"{row['peak_gb']:.1f}", f"{row['host_gb']:.1f}", f"{row['first_s']:.0f}"]
        cached = f"{row['cached_first_s']:.0f}" if "cached_first_s" in row else ""
        cells.append(f"failed: {row['cached_error']}" if "cached_error" in row else cached)
        lines.append(_join(cells))
    return "\n".join(lines)


def format_batches(rows: Sequence[Row]) -> str:
    """The markdown table of throughput; the gain is over the smallest batch of bucket and dtype."""
    lines = [
        "| bucket | dtype | batch | tokens a step | tokens/s | gain | s/step | model TFLOP/s "
        "| peak GB |",
        "| --- " * 9 + "|",
    ]
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        bucket, dtype, batch = row["name"].split("/")
        if "error" in row:
            cells = [bucket, dtype, batch, f"failed: {row['error']}", *[""] * 5]
        else:
            speed = row["tokens"] / row["step_s"]
            gain = speed / first.setdefault((bucket, dtype), speed)
            cells = [bucket, dtype, batch, f"{row['tokens']:,}", f"{speed:,.0f}", f"{gain:.2f}"]
            cells += [f"{row['step_s']:.3f}", f"{row['model_tflops']:.0f}", f"{row['peak_gb']:.1f}"]
        lines.append(_join(cells))
    return "\n".join(lines)


def _describe(what: str, row: Row) -> str:
    if what.startswith("peer_"):
        return f"Diffusers + PEFT, {what.removeprefix('peer_')}"
    flags = row["command"].split()
    policy = flags[flags.index("--activation_checkpointing") + 1]
    if what.endswith("gb"):
        swapped = flags[flags.index("--blocks_to_swap") + 1]
        return f"ours, float8 within {what[:-2]} GB, `{policy}`, {swapped} blocks streamed"
    return f"ours, {what}, `{policy}`"


def _join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _output(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
