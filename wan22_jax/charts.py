"""How does a curve look as SVG inside of an HTML page? Colours follow the page's light or dark.

A chart never has more points than pixels: raw values are drawn as the band between the lowest and
the highest of each pixel, smoothed ones are sampled.
"""

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wan22_jax.training.events import Curve

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_COLUMNS = 300  # points of a line
_BIG_ENOUGH = 20  # values from which on a line is smoothed, and outliers are cut off

STYLE = """
.charts { display: grid; gap: 1rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; }
figure { padding: .6rem .6rem .2rem; }
figcaption { font-weight: 600; display: flex; flex-wrap: wrap; gap: .1rem .8rem; }
figcaption { align-items: baseline; }
figcaption span { font-weight: 400; font-size: .85em; white-space: nowrap; }
figcaption i { display: inline-block; width: .8em; height: .25em; margin-right: .3em;
  vertical-align: middle; border-radius: 1px; background: currentColor; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: .75; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .resume { stroke: currentColor; opacity: .4; stroke-dasharray: 3 3; }
svg .raw { opacity: .3; stroke-width: 1; }
svg .line { stroke-width: 1.8; }
svg path { fill: none; stroke: currentColor; stroke-linejoin: round; }
"""


class Line(NamedTuple):
    """One curve of a chart."""

    label: str  # "" leaves it out of the legend
    curve: Curve
    colour: str = "var(--c0)"  # of CSS
    smooth: bool = True  # draw the smoothed curve over the faint raw one
    raw: bool = True  # and that faint one too


def draw_chart(
    title: str, lines: Sequence[Line], *, x_label: str = "step", resumes: Sequence[int] = ()
) -> str:
    """Draws curves into one ``figure`` of HTML; "" if none of them has a value.

    Args:
        title: above the chart, plain text.
        lines: what is drawn, first ones below.
        x_label: what the x axis counts.
        resumes: x values that get a dashed line: a session began there.
    """
    lines = [line._replace(curve=_finite(line.curve)) for line in lines]
    lines = [line for line in lines if len(line.curve.steps_N)]
    if not lines:
        return ""
    x_low, x_high = _range_x(lines)
    shown = [_smooth_if_asked(line) for line in lines]
    y_low, y_high = _range_y(lines, shown)

    def place(curve: Curve) -> str:
        x_N = _LEFT + (curve.steps_N - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        inner = HEIGHT - _TOP - _BOTTOM
        y_N = _TOP + (1 - (curve.values_N - y_low) / (y_high - y_low)) * inner
        y_N = np.clip(y_N, -HEIGHT, 2 * HEIGHT)
        points = [f"{x:.1f} {y:.1f}" for x, y in zip(x_N.tolist(), y_N.tolist(), strict=True)]
        # A lone point is drawn as a short stroke.
        return f"M{'L'.join(points)}" + ("h3" if len(points) == 1 else "")

    parts = _draw_axes(x_low, x_high, y_low, y_high, x_label)
    for x in resumes:
        if x_low < x < x_high:
            at = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
            parts.append(f'<path class="resume" d="M{at:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    for line, smoothed in zip(lines, shown, strict=True):
        style = f'style="color:{line.colour}"'
        is_smooth = smoothed is not line.curve
        if line.raw and is_smooth:
            parts.append(f'<path class="raw" {style} d="{place(_envelope(line.curve))}"/>')
        drawn = _thin_out(smoothed) if is_smooth else _envelope(smoothed)
        parts.append(f'<path class="line" {style} d="{place(drawn)}"/>')
    legend = "".join(
        f'<span><i style="color:{line.colour}"></i>{html.escape(line.label)} '
        f"{format_value(smoothed.values_N[-1])}</span>"
        for line, smoothed in zip(lines, shown, strict=True)
        if line.label
    )
    clip = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>\n"
        f"{clip}{''.join(parts)}</svg></figure>\n"
    )


def smooth(curve: Curve, window: float) -> Curve:
    """Averages with weights that fall by 1/e in ``window`` values; the start is not biased."""
    keep = math.exp(-1 / window)
    total = weight = 0.0
    smoothed = []
    for value in curve.values_N.tolist():
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return Curve(curve.steps_N, np.array(smoothed))


def format_value(value: float) -> str:
    """Formats with about four digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def _smooth_if_asked(line: Line) -> Curve:
    size = len(line.curve.steps_N)
    if not line.smooth or size < _BIG_ENOUGH:
        return line.curve
    return smooth(line.curve, max(5.0, size / 40))


def _finite(curve: Curve) -> Curve:
    is_finite_N = np.isfinite(curve.values_N)
    return Curve(curve.steps_N[is_finite_N], curve.values_N[is_finite_N])


def _range_x(lines: Sequence[Line]) -> tuple[float, float]:
    low = min(float(line.curve.steps_N[0]) for line in lines)
    high = max(float(line.curve.steps_N[-1]) for line in lines)
    return (low, high) if low < high else (low - 1, high + 1)


def _range_y(lines: Sequence[Line], shown: Sequence[Curve]) -> tuple[float, float]:
    values = []
    for line, curve in zip(lines, shown, strict=True):
        drawn_N = line.curve.values_N if line.raw else curve.values_N
        if len(drawn_N) >= _BIG_ENOUGH and line.smooth:  # a spike must not flatten all the rest
            drawn_N = np.quantile(drawn_N, [0.005, 0.995])
        values.append(drawn_N)
    low, high = (float(bound(np.concatenate(values))) for bound in (np.min, np.max))
    # What is all but constant, as memory, is drawn as such.
    margin = max(0.05 * (high - low), 0.02 * abs(high) - (high - low)) or 1.0
    return (0.0 if 0 <= low < margin else low - margin), high + margin


def _envelope(curve: Curve) -> Curve:
    """Keeps the lowest and the highest value of each column of pixels."""
    if len(curve.steps_N) <= 2 * _COLUMNS:
        return curve
    bounds = np.linspace(0, len(curve.steps_N), _COLUMNS + 1).astype(int)
    kept = []
    for start, end in itertools.pairwise(bounds):
        part_N = curve.values_N[start:end]
        kept += sorted({start + int(part_N.argmin()), start + int(part_N.argmax())})
    return Curve(curve.steps_N[kept], curve.values_N[kept])


def _thin_out(curve: Curve) -> Curve:
    if len(curve.steps_N) <= _COLUMNS:
        return curve
    kept = np.linspace(0, len(curve.steps_N) - 1, _COLUMNS).astype(int)
    return Curve(curve.steps_N[kept], curve.values_N[kept])


def _draw_axes(x_low: float, x_high: float, y_low: float, y_high: float, x_label: str) -> list[str]:
    parts = []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for y in _ticks(y_low, y_high, 4):
        at = _TOP + (1 - (y - y_low) / (y_high - y_low)) * (bottom - _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        text = f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for x in _ticks(x_low, x_high, 5):
        at = _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT)
        if x != int(x) or at > right - 16:
            continue  # there is no half a step, and the last label would be cut
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(
        f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    return parts


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Chooses about so many round numbers between two."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
