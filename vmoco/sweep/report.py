"""report.html of a sweep: what its trials scored, by setting and over time. One file, which needs no network."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from vmoco import tracking
from vmoco.sweep.ledger import Sweep, Trial

PAGE = "report.html"
Curves = dict[str, list[tuple[int, float]]]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .25rem .7rem; text-align: left; }
tr { border-top: 1px solid #8884; } .best { font-weight: 600; background: #22a06b22; } .wide { overflow-x: auto; }
"""


def write_report(sweep: Sweep, folder: Path) -> Path:
    """Fetches the curves of all trials from the tracker, and writes the page; returns its path."""
    scores = {trial.name: tracking.history(trial.run_id, sweep.score) for trial in sweep.trials if trial.run_id}
    best = sweep.best()
    decay = tracking.history(best.run_id, "decay") if best and best.run_id else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE
    path.write_text(page(sweep, scores, decay))
    return path


def page(sweep: Sweep, scores: Curves, decay: list[tuple[int, float]]) -> str:
    """The page.

    Args:
        sweep: with its trials.
        scores: by trial, step and score of each scored checkpoint.
        decay: step and t of the best trial.
    """
    scored = [trial for trial in sweep.trials if sweep.score in trial.scores]
    axes = list(sweep.trials[0].values)
    figures: list[tuple[str, go.Figure]] = []
    if len(axes) >= 2 and scored:
        figures.append((f"{sweep.metric} by {axes[0]} and {axes[1]}", _heat_map(sweep, scored, axes[0], axes[1])))
    if scored:
        figures.append(("All settings at once", _parallel(sweep, scored, axes)))
    if any(scores.values()):
        figures.append((f"{sweep.metric} over training", _lines(scores, "step", sweep.metric)))
    if decay:
        figures.append(("Decay t of the best trial", _lines({"t": decay}, "step", "t")))
    parts = []
    for place, (title, figure) in enumerate(figures):
        figure.update_layout(margin={"l": 70, "r": 40, "t": 30, "b": 60}, height=420, template="plotly_white")
        # The first brings the library along for all.
        drawn = figure.to_html(full_html=False, include_plotlyjs=place == 0, config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn}")
    title = html.escape(f"Sweep {sweep.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1><p>{html.escape(_summary(sweep))}</p>{''.join(parts)}"
        f"<h2>Trials</h2>{_table(sweep, axes)}</body></html>"
    )


def _summary(sweep: Sweep) -> str:
    states = [trial.status for trial in sweep.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    said = f"{len(states)} trials on data {sweep.manifest_hash}: {counts}."
    if best := sweep.best():
        values = ", ".join(f"{axis} {value}" for axis, value in best.values.items())
        said += f" Best by {sweep.metric}: {best.name} ({values}) with {best.scores[sweep.score]:.3f}"
        if sweep.metric == "retrieval" and "score/retrieval_by_colour" in best.scores:
            said += f"; mean colour alone reaches {best.scores['score/retrieval_by_colour']:.3f}"
        said += f", registered as {sweep.registered}." if sweep.registered else "."
    return said


def _heat_map(sweep: Sweep, scored: list[Trial], down: str, across: str) -> go.Figure:
    """Where more axes vary than two, a cell is the best of its trials."""
    rows, columns = ([str(v) for v in dict.fromkeys(t.values[axis] for t in scored)] for axis in (down, across))
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for trial in scored:
        row, column = rows.index(str(trial.values[down])), columns.index(str(trial.values[across]))
        value, before = trial.scores[sweep.score], cells[row][column]
        cells[row][column] = value if before is None else max(before, value)
    heat = go.Heatmap(z=cells, x=columns, y=rows, texttemplate="%{z:.3f}", colorscale="Viridis")
    figure = go.Figure(heat)
    figure.update_xaxes(title=across, type="category")
    figure.update_yaxes(title=down, type="category")
    return figure


def _parallel(sweep: Sweep, scored: list[Trial], axes: list[str]) -> go.Figure:
    dimensions: list[dict[str, Any]] = []
    for axis in axes:
        values = [trial.values[axis] for trial in scored]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            dimensions.append({"label": axis, "values": values})
            continue
        names = list(dict.fromkeys(map(str, values)))
        places = [names.index(str(value)) for value in values]
        dimensions.append({"label": axis, "values": places, "tickvals": list(range(len(names))), "ticktext": names})
    dimensions += [
        {"label": name.removeprefix("score/"), "values": [trial.scores.get(name) for trial in scored]}
        for name in dict.fromkeys((sweep.score, "score/effective_rank"))
    ]
    colours = [trial.scores[sweep.score] for trial in scored]
    line = {"color": colours, "colorscale": "Viridis", "showscale": True}
    return go.Figure(go.Parcoords(line=line, dimensions=dimensions))


def _lines(curves: Curves, across: str, up: str) -> go.Figure:
    figure = go.Figure()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        figure.add_scatter(x=steps, y=values, name=name, mode="lines+markers")
    figure.update_xaxes(title=across)
    figure.update_yaxes(title=up)
    return figure


def _table(sweep: Sweep, axes: list[str]) -> str:
    best = sweep.best()
    names = list(dict.fromkeys((sweep.score, "score/retrieval_by_colour", "score/effective_rank")))
    heads = ["trial", "state", "step", *axes, *(name.removeprefix("score/") for name in names), "reason"]
    rows = []
    worst = float("-inf")
    for trial in sorted(sweep.trials, key=lambda trial: -trial.scores.get(sweep.score, worst)):
        numbers = [f"{trial.scores[name]:.3f}" if name in trial.scores else "" for name in names]
        values = [str(trial.values[axis]) for axis in axes]
        cells = [trial.name, trial.status, f"{trial.step}/{trial.steps}", *values, *numbers, trial.reason]
        kind = ' class="best"' if trial is best else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
