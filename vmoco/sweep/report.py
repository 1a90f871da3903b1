"""The report of a sweep: what its trials scored, by setting and over time.

One HTML file that needs no network, and its two main pictures as PNG.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure

from vmoco import storage, tracking
from vmoco.sweep.record import Sweep, Trial
from vmoco.sweep.space import as_text, short

PAGE = "report.html"
Curves = dict[str, list[tuple[int, float]]]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .25rem .7rem; text-align: left; }
tr { border-top: 1px solid #8884; } td:first-child { white-space: nowrap; }
.best { font-weight: 600; background: #22a06b22; } .wide { overflow-x: auto; }
"""


def write_report(sweep: Sweep, *, show: Callable[[str], None]) -> str:
    """Writes page and pictures to the sweep's folder and to its run in the tracker. The curves come from the tracker.

    Args:
        sweep: with its trials.
        show: prints a line.

    Returns:
        URI of the page.
    """
    scores = {trial.name: tracking.history(trial.run_id, sweep.score) for trial in sweep.trials if trial.run_id}
    best = sweep.best()
    chain = sweep.lineage(best) if best else []
    decay = [point for trial in chain if trial.run_id for point in tracking.history(trial.run_id, "decay")]
    documents: dict[str, str | bytes] = {PAGE: page(sweep, scores, decay)} | pictures(sweep, scores)
    for name, content in documents.items():
        storage.write_atomic(
            storage.join(sweep.folder, name), content.encode() if isinstance(content, str) else content
        )
    if problem := tracking.note_run(sweep.parent_run, tags={"vmoco.best": sweep.registered}, documents=documents):
        show(f"warning: {problem}")
    return storage.join(sweep.folder, PAGE)


def page(sweep: Sweep, scores: Curves, decay: list[tuple[int, float]]) -> str:
    """The HTML page.

    Args:
        sweep: with its trials.
        scores: by trial, step and score of each scored checkpoint.
        decay: step and t of the best trial.
    """
    scored = [trial for trial in sweep.trials if sweep.score in trial.scores]
    axes = list(sweep.trials[0].values)
    figures: list[tuple[str, go.Figure]] = []
    if _has_two_axes(sweep):
        figures.append((f"{sweep.metric} by {axes[0]} and {axes[1]}", _heat_map(sweep)))
    if scored:
        figures.append(("All settings at once", _parallel(sweep, scored, axes)))
    if any(scores.values()):
        figures.append((f"{sweep.metric} over training", _lines(scores, "step", sweep.metric)))
    if decay:
        figures.append(("Decay t of the best trial", _lines({"t": decay}, "step", "t").update_yaxes(tickformat=".6~f")))
    parts = []
    for place, (title, figure) in enumerate(figures):
        figure.update_layout(margin={"l": 90, "r": 40, "t": 70, "b": 60}, height=440, template="plotly_white")
        # The first figure includes the library for all.
        drawn = figure.to_html(full_html=False, include_plotlyjs=place == 0, config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn}")
    title = html.escape(f"Sweep {sweep.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1><p>{html.escape(_summary(sweep))}</p>{''.join(parts)}"
        f"{_schedule(sweep, axes)}<h2>Trials</h2>{_table(sweep, axes)}</body></html>"
    )


def _summary(sweep: Sweep) -> str:
    states = [trial.status for trial in sweep.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    text = f"{len(states)} trials on data {sweep.manifest_hash}: {counts}."
    best = sweep.best()
    if best is None:
        return text + " None has finished with a score."
    text += f" Best by {sweep.metric}: {best.name} ({as_text(best.values)}) with {best.scores[sweep.score]:.3f}"
    text += f", registered as {sweep.registered}." if sweep.registered else "."
    colour = best.scores.get("score/retrieval_by_colour")
    if sweep.metric == "retrieval" and colour is not None:
        text += f" Mean colour alone reaches {colour:.3f}"
        beaten = best.scores[sweep.score] > colour
        text += (
            "." if beaten else ", so no trial shows that it has learned more than colour: train longer, on more videos."
        )
    return text


def _grid(sweep: Sweep) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Rows (first axis), columns (second axis) and scores; if more axes vary, the best score of each cell."""
    scored = [trial for trial in sweep.trials if sweep.score in trial.scores]
    down, across = list(sweep.trials[0].values)[:2]
    rows, columns = (_ordered([trial.values[axis] for trial in scored]) for axis in (down, across))
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for trial in scored:
        row, column = rows.index(short(trial.values[down])), columns.index(short(trial.values[across]))
        value, before = trial.scores[sweep.score], cells[row][column]
        cells[row][column] = value if before is None else max(before, value)
    return rows, columns, cells


def _ordered(values: list[Any]) -> list[str]:
    """Each value once: numbers ascending, others in the given order."""
    numbers = all(isinstance(value, int | float) for value in values)
    return list(dict.fromkeys(map(short, sorted(values) if numbers else values)))


def _has_two_axes(sweep: Sweep) -> bool:
    return len(sweep.trials[0].values) >= 2 and any(sweep.score in trial.scores for trial in sweep.trials)


def _is_grid(cells: list[list[float | None]]) -> bool:
    """Whether most cells have a score. Trials that are drawn from ranges rarely share a row."""
    flat = [cell for row in cells for cell in row]
    return len([cell for cell in flat if cell is not None]) * 2 > len(flat)


def _heat_map(sweep: Sweep) -> go.Figure:
    """Scores by the first two axes: as cells, or as points if trials are scattered."""
    rows, columns, cells = _grid(sweep)
    down, across = list(sweep.trials[0].values)[:2]
    if _is_grid(cells):
        figure = go.Figure(go.Heatmap(z=cells, x=columns, y=rows, texttemplate="%{z:.3f}", colorscale="Viridis"))
        figure.update_xaxes(type="category")
        figure.update_yaxes(type="category")
    else:
        scored = [trial for trial in sweep.trials if sweep.score in trial.scores]
        scores = [trial.scores[sweep.score] for trial in scored]
        points = go.Scatter(
            x=[trial.values[across] for trial in scored],
            y=[trial.values[down] for trial in scored],
            text=[f"{trial.name}: {score:.3f}" for trial, score in zip(scored, scores, strict=True)],
            mode="markers",
            marker={"color": scores, "colorscale": "Viridis", "showscale": True, "size": 14},
        )
        figure = go.Figure(points)
    figure.update_xaxes(title=across)
    figure.update_yaxes(title=down)
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


def pictures(sweep: Sweep, scores: Curves) -> dict[str, bytes]:
    """PNGs by file name: scores by the first two axes, and scores over training."""
    drawn = {}
    if _has_two_axes(sweep):
        drawn["scores.png"] = _png(_score_picture(sweep))
    if any(scores.values()):
        figure, axes = _figure(width=8, height=5)
        for name, points in scores.items():
            axes.plot([step for step, _ in points], [value for _, value in points], marker=".", label=name)
        axes.set(xlabel="step", ylabel=sweep.metric, title=f"{sweep.metric} over training")
        if len(scores) <= 16:
            axes.legend(fontsize="x-small")
        drawn["curves.png"] = _png(figure)
    return drawn


def _score_picture(sweep: Sweep) -> Figure:
    rows, columns, cells = _grid(sweep)
    down, across = list(sweep.trials[0].values)[:2]
    if _is_grid(cells):
        figure, axes = _figure(width=2.5 + 1.1 * len(columns), height=1.6 + 0.7 * len(rows))
        shown = axes.imshow([[float("nan") if cell is None else cell for cell in row] for row in cells], origin="lower")
        for row, found in enumerate(cells):
            for column, cell in enumerate(found):
                if cell is not None:
                    axes.text(column, row, f"{cell:.3f}", ha="center", va="center", backgroundcolor="#ffffffa0")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
    else:
        figure, axes = _figure(width=7, height=5)
        scored = [trial for trial in sweep.trials if sweep.score in trial.scores]
        places = [[trial.values[axis] for trial in scored] for axis in (across, down)]
        shown = axes.scatter(*places, c=[trial.scores[sweep.score] for trial in scored], s=60)
    axes.set(xlabel=across, ylabel=down, title=f"{sweep.metric} of {sweep.name}")
    figure.colorbar(shown)
    return figure


def _figure(*, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _schedule(sweep: Sweep, axes: list[str]) -> str:
    """The settings with which the best member of a population was trained, generation by generation."""
    best = sweep.best()
    if best is None or best.generation == 0:
        return ""
    rows, begin = [], 0
    for trial in sweep.lineage(best):
        rows.append([f"{begin} to {trial.steps}", trial.name, *(short(trial.values[axis]) for axis in axes)])
        begin = trial.steps
    return "<h2>The schedule that was found</h2>" + _html_table(["steps", "trial", *axes], rows)


def _html_table(heads: list[str], rows: list[list[str]], *, best: int | None = None) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    lines = []
    for place, row in enumerate(rows):
        kind = ' class="best"' if place == best else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _table(sweep: Sweep, axes: list[str]) -> str:
    best, worst = sweep.best(), float("-inf")
    trials = sorted(sweep.trials, key=lambda trial: -trial.scores.get(sweep.score, worst))
    names = list(dict.fromkeys((sweep.score, "score/retrieval_by_colour", "score/effective_rank")))
    heads = ["trial", "state", "step", *axes, *(name.removeprefix("score/") for name in names), "minutes", "reason"]
    rows = [
        [
            trial.name,
            trial.status,
            f"{trial.step}/{trial.steps}",
            *(short(trial.values[axis]) for axis in axes),
            *(f"{trial.scores[name]:.3f}" if name in trial.scores else "" for name in names),
            f"{trial.seconds / 60:.1f}",
            trial.reason,
        ]
        for trial in trials
    ]
    return _html_table(heads, rows, best=trials.index(best) if best else None)
