"""How does a run look in a browser? One HTML file that needs no other and no network."""

import html
from datetime import UTC, datetime
from pathlib import Path

from wan22_jax.charts import STYLE as CHART_STYLE
from wan22_jax.charts import Line, draw_chart, format_value
from wan22_jax.report_samples import STYLE as SAMPLE_STYLE
from wan22_jax.report_samples import write_samples
from wan22_jax.run_summary import RunSummary, Saved, describe_state, digest_config, format_bytes
from wan22_jax.training.events import EPOCH_LOSS, Curve
from wan22_jax.training.metrics import NUM_DECILES, TASKS, format_duration, name_decile
from wan22_jax.training.status import is_alive

FILE = "report.html"
_TASK_NAMES = {"t2v": "text-to-video", "i2v": "image-to-video"}

_STYLE = (
    """
:root { color-scheme: light dark; --line: #8884; --soft: #8881;
  --c0: #2563c9; --c1: #c2570c; --c2: #16803c; --c3: #8b3fc4; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #6ea8ff; --c1: #ff9d5c; --c2: #5fd38d; --c3: #c79bff; }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; }
body { max-width: 84rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .7rem; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .charts + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; }
th { background: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.k { white-space: nowrap; } td.wide { overflow-wrap: anywhere; min-width: 14rem; }
pre { background: var(--soft); padding: .8rem; border-radius: .5rem; overflow-x: auto; }
summary { cursor: pointer; }
"""
    + CHART_STYLE
    + SAMPLE_STYLE
)


def write_report(run: RunSummary, out: Path) -> None:
    """Writes the page of a run; its pictures are inside, its clips are linked beside ``out``."""
    title = html.escape(run.run_dir.absolute().name)
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(describe_state(run.status))}. "
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>\n",
        _write_cards(run),
        _write_section("Loss", _draw_loss(run)),
        _write_section("Loss by noise level", _draw_deciles(run)),
        _write_decile_table(run.curves),
        _write_section("Evaluation", _draw_evals(run)),
        _write_section("Optimizer and speed", _draw_speed(run)),
        write_samples(run.run_dir, out),
        _write_saved(run),
        _write_sessions(run),
        "</html>\n",
    ]
    out.write_text("".join(parts), "utf-8")


def _write_section(title: str, charts: list[str]) -> str:
    drawn = "".join(charts)
    return f'<h2>{title}</h2>\n<div class="charts">\n{drawn}</div>\n' if drawn else ""


def _write_cards(run: RunSummary) -> str:
    cards: dict[str, str] = {}
    if (status := run.status) is not None:
        cards["step"] = f"{status.step:,} of {status.total_steps:,}"
        cards["epoch"] = f"{status.epoch} of {status.epochs}"
        if status.average_loss is not None:
            cards["smoothed loss"] = format_value(status.average_loss)
        if status.step_s is not None:
            cards["s/step"] = format_value(status.step_s)
            cards["samples/s"] = format_value(status.samples_per_s or 0)
            cards["tokens/s"] = f"{status.tokens_per_s or 0:,.0f}"
            cards["model TFLOP/s"] = format_value(status.model_tflops or 0)
            left = status.total_steps - status.step
            if status.state == "running" and left > 0 and is_alive(status) is not False:
                cards["left"] = format_duration(left * status.step_s)
        if status.peak_memory_gb is not None:
            cards["GB at most"] = f"{status.peak_memory_gb:.1f}"
        cards["device"] = html.escape(status.device)
    shown = (f'<div class="card"><b>{value}</b>{name}</div>' for name, value in cards.items())
    return f'<div class="cards">{"".join(shown)}</div>\n' if cards else ""


def _draw_loss(run: RunSummary) -> list[str]:
    curves, resumes = run.curves, _resumes(run)
    tasks = [
        Line(_TASK_NAMES[task], curves[f"train/loss_{task}"], f"var(--c{number})", raw=False)
        for number, task in enumerate(TASKS)
        if f"train/loss_{task}" in curves
    ]
    return [
        draw_chart("Loss", _lines(curves, "train/loss"), resumes=resumes),
        draw_chart("Loss of an epoch", _lines(curves, EPOCH_LOSS, smooth=False), x_label="epoch"),
        draw_chart("Loss by task", tasks, resumes=resumes),
    ]


def _draw_deciles(run: RunSummary) -> list[str]:
    names = [name_decile((number + 0.5) / NUM_DECILES) for number in range(NUM_DECILES)]
    charts = []
    for start, title in ((0, "Less noise than picture"), (5, "More noise than picture")):
        lines = [
            Line(
                f"{name.removeprefix('loss_sigma_')}",
                run.curves[f"train/{name}"],
                _hue(number / (NUM_DECILES - 1)),
                raw=False,
            )
            for number, name in list(enumerate(names))[start : start + 5]
            if f"train/{name}" in run.curves
        ]
        charts.append(draw_chart(f"{title} (sigma)", lines, resumes=_resumes(run)))
    return charts


def _hue(share: float) -> str:
    # From blue to red through green; as bright in both themes as text is readable on them.
    return f"hsl({240 - 240 * share:.0f} 65% 52%)"


def _write_decile_table(curves: dict[str, Curve]) -> str:
    rows = []
    for number in range(NUM_DECILES):
        name = name_decile((number + 0.5) / NUM_DECILES)
        curve = curves.get(f"train/{name}")
        if curve is None or len(curve.values_N) < 2:
            continue
        part = max(1, len(curve.values_N) // 5)
        first, last = (
            float(some.mean()) for some in (curve.values_N[:part], curve.values_N[-part:])
        )
        change = f"{last / first - 1:+.1%}" if first else ""
        rows.append(
            f"<tr><td class=k>{name.removeprefix('loss_sigma_')}<td class=n>{len(curve.values_N):,}"
            f"<td class=n>{first:.4f}<td class=n>{last:.4f}<td class=n>{change}\n"
        )
    if not rows:
        return ""
    columns = ("values", "first fifth", "last fifth", "change")
    head = "<tr><th>sigma" + "".join(f"<th class=n>{column}" for column in columns)
    return f'<div class="scroll"><table>{head}\n{"".join(rows)}</table></div>\n'


def _draw_evals(run: RunSummary) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in run.curves:
        if not name.startswith("train/"):
            groups.setdefault(name.rpartition("/")[0], []).append(name)
    charts = []
    for group, names in sorted(groups.items()):
        quantiles = sorted(name for name in names if "loss_quantile_" in name)
        for title, some in (
            (group, sorted(set(names) - set(quantiles))),
            (f"{group}, by noise level (quantile)", quantiles),
        ):
            lines = [
                Line(
                    name.rpartition("/")[2].removeprefix("loss_quantile_"),
                    run.curves[name],
                    _hue(number / max(1, len(some) - 1)) if some is quantiles else "var(--c0)",
                    smooth=False,
                )
                for number, name in enumerate(some)
            ]
            losses = [line for line in lines if some is quantiles or "loss" in line.label]
            charts.append(draw_chart(title, losses, resumes=_resumes(run)))
            rest = [line for line in lines if line not in losses]
            charts += [draw_chart(f"{group}/{one.label}", [one]) for one in rest]
    return charts


def _draw_speed(run: RunSummary) -> list[str]:
    curves, resumes = run.curves, _resumes(run)
    charts = []
    for name, title, smooth in (
        ("lr", "Learning rate", False),
        ("grad_norm", "Norm of the gradient", True),
        ("step_time_s", "Seconds a step", True),
        ("samples_per_s", "Samples a second", True),
        ("tokens_per_s", "Tokens a second", True),
        ("model_tflops", "Model TFLOP/s, recompute not counted", True),
        ("peak_memory_gb", "Peak device memory, GB", False),
    ):
        lines = _lines(curves, f"train/{name}", smooth=smooth)
        charts.append(draw_chart(title, lines, resumes=resumes))
    return charts


def _lines(curves: dict[str, Curve], name: str, *, smooth: bool = True) -> list[Line]:
    label = "smoothed" if smooth else "last"
    return [Line(label, curves[name], smooth=smooth)] if name in curves else []


def _resumes(run: RunSummary) -> list[int]:
    return [session.first_step for session in run.sessions[1:]]


def _write_saved(run: RunSummary) -> str:
    rows = [
        *_list_saved(run, run.checkpoints, "checkpoint"),
        *_list_saved(run, run.adapters, "file"),
    ]
    if not rows:
        return ""
    head = "<tr><th>what<th>where<th class=n>size<th class=n>saved, UTC"
    table = f"<table>{head}\n{''.join(rows)}</table>"
    return f'<h2>Saved</h2>\n<div class="scroll">{table}</div>\n'


def _list_saved(run: RunSummary, some: list[Saved], what: str) -> list[str]:
    return [
        f"<tr><td>{what}<td class=wide>{html.escape(str(saved.path.relative_to(run.run_dir)))}"
        f"<td class=n>{format_bytes(saved.num_bytes)}"
        f"<td class=n>{datetime.fromtimestamp(saved.saved_at, UTC):%Y-%m-%d %H:%M}\n"
        for saved in some
    ]


def _write_sessions(run: RunSummary) -> str:
    if not run.sessions:
        return ""
    rows = [
        f"<tr><td>{datetime.fromtimestamp(session.started_at, UTC):%Y-%m-%d %H:%M}"
        f"<td class=n>{session.first_step:,}"
        f"<td class=wide>{'<br>'.join(map(html.escape, session.changes))}\n"
        for session in run.sessions
    ]
    last = run.sessions[-1]
    head = "<tr><th>started, UTC<th class=n>after step<th>changed since the checkpoint"
    return (
        f'<h2>Sessions</h2>\n<div class="scroll"><table>{head}\n{"".join(rows)}</table></div>\n'
        f"<h2>Config</h2>\n<details><summary>main TOML of the last session, sha256 "
        f"{digest_config(last)}</summary>\n<pre>{html.escape(last.config)}</pre></details>\n"
    )
