"""What would be cached and trained, and what not, before anything is encoded?

``preflight.json`` in the report's folder holds

  files     per file: size, frames and rate as it says and at 24 fps, frames kept, clips, verdict
            ('used', 'skipped': the dataset file says so, 'dropped': no bucket takes it, 'error')
            and the reason why it has no clips
  buckets   per bucket: clips, entries of an epoch (repeats and captions counted), clips of a step,
            steps, entries that each epoch leaves out (others every time), tokens of a clip, bytes
            of all latents
  totals    files by verdict, clips, steps and (mean) tokens an epoch, bytes
  notes     what else lies there

Memory does not grow with the number of files: the file is written as they come.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from wan22_jax.data.batching import Batching, EpochLength, count_steps
from wan22_jax.data.preflight_page import Page
from wan22_jax.data.survey import Folder, Outcome, survey_folder
from wan22_jax.geometry import FPS, Bucket
from wan22_jax.outputs import check_folder

JSON_NAME, PAGE_NAME = "preflight.json", "preflight.html"


class Epoch(NamedTuple):
    """What the training config says of an epoch."""

    batching: Batching
    subsample_ratio: float | int | None = None


def report_dataset(
    folders: Sequence[tuple[Folder, float | int]],
    epoch: Epoch,
    *,
    title: str,
    into: Path,
    print_line: Callable[[str], None],
) -> dict[str, Any]:
    """Surveys folders, prints a line for each file and a table, and writes both reports.

    Args:
        folders: each with its ``num_repeats``.
        epoch: what makes steps of clips.
        title: of the page.
        into: the folder for the reports; made if it does not exist.
        print_line: takes lines of text.

    Returns:
        The ``totals`` of the JSON file.

    Raises:
        BadInput: as ``survey_folder``.
    """
    check_folder(into)
    into.mkdir(parents=True, exist_ok=True)
    counts, notes, page = _Counts(), [], Page()
    with _write_whole(into / JSON_NAME) as file:
        file.write('{"format": "wan22_jax preflight 1", "files": [')
        comma = ""
        for folder, num_repeats in folders:
            entries: Counter[Bucket] = Counter()
            for outcome in survey_folder(folder, warn=notes.append):
                row = _describe_file(outcome)
                file.write(f"{comma}\n{json.dumps(row)}")
                comma = ","
                print_line(_format_file(row))
                page.add(outcome, row)
                counts.verdicts[outcome.verdict] += 1
                for clip in outcome.clips:
                    counts.clips[clip.bucket] += 1
                    entries[clip.bucket] += len(clip.captions)
            for bucket, number in entries.items():
                counts.entries[bucket] += int(number * num_repeats)
        length = count_steps(counts.entries, epoch.batching, subsample_ratio=epoch.subsample_ratio)
        buckets = _describe_buckets(counts, epoch.batching, length)
        totals = _sum_up(counts, epoch.batching, length)
        rest = {"buckets": buckets, "totals": totals, "notes": notes}
        file.write(f"\n], {json.dumps(rest)[1:]}\n")
    with _write_whole(into / PAGE_NAME) as file:
        page.write(file, title=title, buckets=buckets, totals=totals, notes=notes)
    for line in [*(f"note: {note}" for note in notes), *_format_table(buckets, totals)]:
        print_line(line)
    print_line(f"written: {into / JSON_NAME} and {into / PAGE_NAME}")
    return totals


def choose_exit_code(totals: dict[str, Any], *, allow_drop: bool) -> int:
    """Says how ``wan22-cache --dry-run`` ends.

    2 if a file is broken or no clip is left, 1 if sound clips would not train (no bucket takes
    them, or one has fewer than a step takes) and that is not allowed, else 0; but 2 if an epoch
    has no step, which training refuses.
    """
    if totals["files"]["error"] or not totals["clips"]:
        return 2
    if (totals["files"]["dropped"] or totals["clips_never_trained"]) and not allow_drop:
        return 1
    return 0 if totals["steps_per_epoch"] else 2


class _Counts:
    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.clips: Counter[Bucket] = Counter()
        self.entries: Counter[Bucket] = Counter()


def _describe_file(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(outcome.path), "verdict": outcome.verdict}
    if outcome.reason:
        row["reason"] = outcome.reason
    if (info := outcome.info) is not None:
        row |= {"width": info.width_px, "height": info.height_px, "frames": info.frames}
        if not info.is_image:
            used = outcome.clips[0].info if outcome.clips else info
            row |= {"fps": round(float(info.fps), 3), "uneven": info.is_uneven, "fps_out": FPS}
            row |= {"read_as_fps": round(float(used.fps), 3), "frames_out": used.frames_24}
    if outcome.clips:
        row["frames_kept"] = len(
            {clip.start + k for clip in outcome.clips for k in range(clip.bucket.frames)}
        )
        row["captions"] = len(outcome.clips[0].captions)
        row["clips"] = [{"bucket": str(clip.bucket), "start": clip.start} for clip in outcome.clips]
        if outcome.clips[0].mask is not None:
            row["mask"] = str(outcome.clips[0].mask)
    return row


def _describe_buckets(
    counts: _Counts, batching: Batching, length: EpochLength
) -> list[dict[str, Any]]:
    return [
        {
            "bucket": str(bucket),
            "clips": counts.clips[bucket],
            "entries": counts.entries[bucket],
            "clips_per_step": batching.per_step(bucket),
            "steps": length.steps[bucket],
            "left_out_each_epoch": counts.entries[bucket] % batching.per_step(bucket),
            "tokens": bucket.num_tokens,
            "bytes": counts.clips[bucket] * bucket.num_bytes,
        }
        for bucket in sorted(counts.clips)
    ]


def _sum_up(counts: _Counts, batching: Batching, length: EpochLength) -> dict[str, Any]:
    steps, num_steps = length.steps, length.kept + length.left_out
    tokens = sum(n * batching.per_step(bucket) * bucket.num_tokens for bucket, n in steps.items())
    verdicts = ("used", "skipped", "dropped", "error")
    return {
        "files": {verdict: counts.verdicts[verdict] for verdict in verdicts},
        "clips": counts.clips.total(),
        "clips_never_trained": sum(counts.clips[bucket] for bucket in steps if not steps[bucket]),
        "steps_per_epoch": length.kept,
        "steps_left_out_by_subsample_ratio": length.left_out,
        "tokens_per_epoch": tokens * length.kept // max(num_steps, 1),
        "bytes": sum(bucket.num_bytes * number for bucket, number in counts.clips.items()),
    }


def _format_file(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['verdict']:>7}  {row['reason']}"
    shown = f"{row['width']}x{row['height']}"
    if "fps" in row:
        rate = f"{row['frames']} frames at {row['fps']:g} fps"
        rate += " (uneven)" if row["uneven"] else ""
        rate += f" taken for {row['read_as_fps']:g}" if row["read_as_fps"] != row["fps"] else ""
        shown += f", {rate} -> {row['frames_out']} at {FPS}, {row['frames_kept']} kept"
    clips = Counter(clip["bucket"] for clip in row["clips"])
    made = ", ".join(f"{bucket} x {n}" if n > 1 else bucket for bucket, n in clips.items())
    return f"{row['verdict']:>7}  {row['path']}: {shown} -> {made}"


def _format_table(buckets: Iterable[dict[str, Any]], totals: dict[str, Any]) -> Iterator[str]:
    heads = ("bucket", "clips", "entries", "a step", "steps", "left out", "tokens", "MB")
    yield "{:>16} {:>8} {:>8} {:>6} {:>8} {:>9} {:>8} {:>9}".format(*heads)
    for row in buckets:
        yield (
            f"{row['bucket']:>16} {row['clips']:>8} {row['entries']:>8} "
            f"{row['clips_per_step']:>6} {row['steps']:>8} {row['left_out_each_epoch']:>9} "
            f"{row['tokens']:>8} {row['bytes'] / 1e6:>9.1f}"
            + ("" if row["steps"] else "  never trained: fewer entries than a step takes")
        )
    files = ", ".join(f"{number} {verdict}" for verdict, number in totals["files"].items())
    yield f"files: {files}"
    yield (
        f"{totals['clips']} clips: {totals['steps_per_epoch']} steps and "
        f"{totals['tokens_per_epoch']} tokens an epoch, {totals['bytes'] / 1e9:.3f} GB of latents"
    )
    if left_out := totals["steps_left_out_by_subsample_ratio"]:
        yield f"subsample_ratio leaves out {left_out} more steps of each epoch, others every time"
    if totals["clips"] and not totals["steps_per_epoch"]:
        yield "an epoch has no step: training would refuse this"


@contextmanager
def _write_whole(path: Path) -> Iterator[TextIO]:
    partial = path.with_name(f".{path.name}.partial")
    try:
        # A file name that is no UTF-8 shows as '?' on the page; JSON escapes it.
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
