"""Table and plot of the ablation: means and spread over seeds, each seed shown as a dot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vmoco.config import PretrainSettings

RESULTS = Path(__file__).parent / "results"
CONTROL = "MoCo + random dropping"
CHANCE = 100 / 6
METHOD = Path(__file__).parents[2] / "vmoco/METHOD.md"
_BEGIN, _END = "<!-- ablation: written by tests.benchmarks.ablation -->\n", "<!-- /ablation -->"


def write_report(results: list[dict[str, Any]], *, settings: PretrainSettings) -> dict[str, Any]:
    """Writes `ablation.json` and `ablation.png`, and the table into vmoco/METHOD.md between its two markers.

    Args:
        results: one for each arm and seed that are done.
        settings: what all arms share.

    Returns:
        Mean and standard deviation over seeds by arm, for the last line of the benchmark.
    """
    arms = list(dict.fromkeys(result["arm"] for result in results))
    seeds = sorted({result["seed"] for result in results})
    values = {
        measure: {arm: np.array([r[measure] for r in results if r["arm"] == arm]) for arm in arms}
        for measure in ("linear", "knn")
    }
    RESULTS.mkdir(exist_ok=True)
    content = {"settings": settings.content(), "seeds": seeds, "results": results}
    (RESULTS / "ablation.json").write_text(json.dumps(content, indent=1) + "\n")
    before, rest = METHOD.read_text().split(_BEGIN)
    METHOD.write_text(before + _BEGIN + _table(arms, values, results) + _END + rest.split(_END)[1])
    _plot(arms, values, num_seeds=len(seeds))
    return {
        arm: {measure: [round(float(v[arm].mean()), 1), round(_spread(v[arm]), 1)] for measure, v in values.items()}
        for arm in arms
    }


def _table(arms: list[str], values: dict[str, dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Markdown; differences to the control are taken seed by seed, because seeds share weights and clips."""
    lines = [
        f"| arm | seeds | linear probe, % | kNN, % | linear, less {CONTROL} | entropy of drops | CPU minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        runs = [result for result in results if result["arm"] == arm]
        linear, knn = values["linear"][arm], values["knn"][arm]
        control = {r["seed"]: r["linear"] for r in results if r["arm"] == CONTROL}
        apart = np.array([run["linear"] - control[run["seed"]] for run in runs if run["seed"] in control])
        against = "" if arm == CONTROL or not len(apart) else _said(apart, sign="+")
        entropies = np.array([run["dropped"]["dropped_entropy"] for run in runs if run["dropped"]])
        entropy = f"{entropies.mean():.3f}" if len(entropies) else ""
        minutes = np.mean([run["cpu_seconds"] for run in runs]) / 60
        lines.append(
            f"| {arm} | {len(runs)} | {_said(linear)} | {_said(knn)} | {against} | {entropy} | {minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _said(values: Any, *, sign: str = "") -> str:
    """Mean and standard deviation over seeds, where there are several."""
    mean = f"{values.mean():{sign}.1f}"
    return f"{mean} ± {_spread(values):.1f}" if len(values) > 1 else mean


def _spread(values: Any) -> float:
    """Standard deviation over seeds."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _plot(arms: list[str], values: dict[str, dict[str, Any]], *, num_seeds: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    places = np.arange(len(arms))[::-1]
    for axis, (measure, name) in zip(axes, (("linear", "linear probe"), ("knn", "kNN")), strict=True):
        for place, arm in zip(places, arms, strict=True):
            found = values[measure][arm]
            axis.barh(place, found.mean(), height=0.6, color="#c6d4e6" if arm != CONTROL else "#8fb0d6")
            axis.plot(found, np.full(len(found), place), "o", color="#20406a", markersize=3.5)
        axis.axvline(CHANCE, color="#888888", linewidth=1, linestyle=":")
        axis.set_title(f"{name}, accuracy on the test maps, %", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, arms)
    figure.suptitle(
        f"Doom ego-motion, 6 classes; bars: mean of up to {num_seeds} seeds, dots: seeds, line: chance", fontsize=9
    )
    # No date and no version in the file: equal results give equal bytes.
    figure.savefig(RESULTS / "ablation.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
