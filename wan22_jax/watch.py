"""wan22-train --status and --report: looks at a run without touching it or a GPU."""

import argparse
import sys
from pathlib import Path

from wan22_jax.config import load_config
from wan22_jax.errors import BadInput, one_line
from wan22_jax.report import FILE, write_report
from wan22_jax.run_summary import describe_run, find_newest, read_run


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that look at a run instead of training."""
    newest = "the newest in --config's output_dir if left out"
    for flag, what in (
        ("--status", "print how a run is, in progress or ended"),
        ("--report", f"write a run's curves, samples and config as one HTML page, {FILE} in it"),
    ):
        parser.add_argument(
            flag, nargs="?", const=True, metavar="RUN", help=f"{what}: its folder; {newest}"
        )
    parser.add_argument("--out", type=Path, help=f"of --report: the page, instead of RUN/{FILE}")


def watch(args: argparse.Namespace) -> None:
    """Does what the flags ask for; BadInput if there is no such run."""
    run = read_run(_choose_run(args.status or args.report, args.config, args.overrides))
    if args.status:
        sys.stdout.writelines(f"{one_line(line)}\n" for line in describe_run(run))
    if args.report:
        out = args.out or run.run_dir / FILE
        write_report(run, out)
        sys.stdout.write(f"{one_line(str(out))}: {out.stat().st_size / 1e6:.2f} MB\n")


def _choose_run(named: str | bool, config: Path | None, overrides: list[str]) -> Path:
    if isinstance(named, str):
        if config is not None and not Path(named).is_dir():
            return Path(load_config(config, overrides).output_dir) / named
        return Path(named)
    if config is None:
        raise BadInput("name a run folder, or give --config whose output_dir holds runs")
    return find_newest(Path(load_config(config, overrides).output_dir))
