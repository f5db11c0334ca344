"""How does the preflight look in a browser? One HTML file that needs no other.

Thumbnails are data: URIs. There is one for each of the first files of a bucket and of each verdict
only, and the list of files ends somewhere, so that a page of a million files still opens.
"""

import html
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from wan22_jax.data.survey import Outcome
from wan22_jax.data.thumbnail import make_thumbnail
from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS

ROWS_PER_VERDICT = 5000
THUMBNAILS = 24  # per bucket, and per verdict of what is left out
THUMBNAIL_PX = 112
# Worst first, with what each is called on the page.
_VERDICTS = {"error": "broken", "dropped": "dropped", "skipped": "skipped", "used": "used"}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; }
body { max-width: 76rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; }
th { background: var(--soft); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.path { overflow-wrap: anywhere; min-width: 15rem; } td.thumb { width: 7rem; }
img { display: block; max-width: 7rem; border-radius: .25rem; }
.error, .dropped, .skipped, .used { font-weight: 600; }
.error { color: #d33; } .dropped { color: #d70; } .skipped { color: #888; } .used { color: #2a2; }
"""


class Page:
    """Collects what the page shows while the files go by."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
        self._seen: Counter[str] = Counter()
        self._pictured: Counter[Any] = Counter()

    def add(self, outcome: Outcome, row: dict[str, Any]) -> None:
        """Adds a file: its outcome, and the JSON row of it."""
        self._seen[outcome.verdict] += 1
        if len(self._rows[outcome.verdict]) < ROWS_PER_VERDICT:
            kinds = {clip.bucket for clip in outcome.clips} or {outcome.verdict}
            thumbnail = ""
            if min(self._pictured[kind] for kind in kinds) < THUMBNAILS:
                thumbnail = _make_thumbnail(outcome)
                self._pictured.update(kinds if thumbnail else ())
            self._rows[outcome.verdict].append(_format_row(row, thumbnail))

    def write(
        self,
        file: TextIO,
        *,
        title: str,
        buckets: Sequence[dict[str, Any]],
        totals: dict[str, Any],
        notes: Sequence[str],
    ) -> None:
        """Writes the page; the last three are those of the JSON file."""
        name = html.escape(title)
        file.write(
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{name}</title>\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<style>{_STYLE}</style>\n<h1>{name}</h1>\n"
        )
        cards = {
            **{f"files {_VERDICTS[v]}": totals["files"][v] for v in reversed(_VERDICTS)},
            "clips": totals["clips"],
            "steps an epoch": totals["steps_per_epoch"],
            "tokens an epoch": f"{totals['tokens_per_epoch']:,}",
            "GB of latents": f"{totals['bytes'] / 1e9:.3f}",
        }
        shown = (f'<div class="card"><b>{value}</b>{key}</div>' for key, value in cards.items())
        file.write(f'<div class="cards">{"".join(shown)}</div>\n<h2>Buckets</h2>\n')
        _write_buckets(file, buckets)
        for verdict in _VERDICTS:
            if rows := self._rows[verdict]:
                file.write(f"<h2>Files {_VERDICTS[verdict]}: {self._seen[verdict]}</h2>\n")
                file.write(f'<table class="files">{_FILE_HEAD}\n')
                file.writelines(rows)
                file.write("</table>\n")
            if (more := self._seen[verdict] - len(rows)) > 0:
                file.write(f"<p>and {more} more: the JSON file lists them all.</p>\n")
        if notes:
            file.write("<h2>Notes</h2>\n<ul>\n")
            file.writelines(f"<li>{html.escape(note)}\n" for note in notes[:ROWS_PER_VERDICT])
            file.write("</ul>\n")
        file.write("</html>\n")


_FILE_HEAD = (
    "<tr><th><th>file<th class=n>size<th class=n>in<th class=n>"
    f"at {FPS} fps<th class=n>kept<th>clips, or why there are none"
)


def _write_buckets(file: TextIO, buckets: Sequence[dict[str, Any]]) -> None:
    file.write(
        '<table class="buckets"><tr><th>bucket<th class=n>clips<th class=n>entries an epoch'
        "<th class=n>clips a step<th class=n>steps<th class=n>left out each epoch"
        "<th class=n>tokens a clip<th class=n>MB\n"
    )
    for row in buckets:
        never = "" if row["steps"] else ' <span class="dropped">never trained</span>'
        file.write(
            f"<tr><td>{row['bucket']}{never}<td class=n>{row['clips']}<td class=n>{row['entries']}"
            f"<td class=n>{row['clips_per_step']}<td class=n>{row['steps']}"
            f"<td class=n>{row['left_out_each_epoch']}<td class=n>{row['tokens']}"
            f"<td class=n>{row['bytes'] / 1e6:.1f}\n"
        )
    file.write("</table>\n")


def _format_row(row: dict[str, Any], thumbnail: str) -> str:
    picture = f'<img alt="" src="{thumbnail}">' if thumbnail else ""
    size = f"{row['width']}x{row['height']}" if "width" in row else ""
    given = at_24 = kept = ""
    if "fps" in row:
        uneven = ", uneven" if row["uneven"] else ""
        given = f"{row['frames']} at {row['fps']:g} fps{uneven}"
        if row["read_as_fps"] != row["fps"]:
            given += f",<br>taken for {row['read_as_fps']:g}"
        at_24, kept = row["frames_out"], row.get("frames_kept", 0)
    if "reason" in row:
        said = html.escape(row["reason"].removeprefix(row["path"] + ": "))
    else:
        clips = Counter(clip["bucket"] for clip in row["clips"])
        said = ", ".join(f"{bucket} x {n}" if n > 1 else bucket for bucket, n in clips.items())
        said += f"; {row['captions']} captions" if row["captions"] != 1 else ""
        said += "; masked" if "mask" in row else ""
    return (
        f"<tr><td class=thumb>{picture}<td class=path>{html.escape(row['path'])}<td class=n>{size}"
        f"<td class=n>{given}<td class=n>{at_24}<td class=n>{kept}"
        f'<td><span class="{row["verdict"]}">{row["verdict"]}</span> {said}\n'
    )


def _make_thumbnail(outcome: Outcome) -> str:
    info = outcome.info
    if info is None or info.frames_24 < 1:
        return ""
    try:
        return make_thumbnail(outcome.path, info, longest_px=THUMBNAIL_PX, quality=70)
    except BadInput:  # nothing to show; the file has its reason, or caching will name it
        return ""
