"""Tables and plot of the ablation: each arm beside plain MoCo and beside random dropping, within a trunk.

Arms that start from the same trunk share everything but what is compared, so their difference is taken trunk by trunk.
The interval is Student's, over trunks. It says nothing about other networks, data or lengths of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vmoco.config import PretrainSettings

RESULTS = Path(__file__).parent / "results"
REFERENCE, CONTROL = "MoCo", "MoCo + random dropping"
METHOD = Path(__file__).parents[2] / "vmoco/METHOD.md"
_BEGIN, _END = "<!-- ablation: written by tests.benchmarks.ablation -->\n", "<!-- /ablation -->"

Result = dict[str, Any]


class Difference(NamedTuple):
    """Of an arm to another, in points of accuracy, over the trunks that have both."""

    mean: float
    half_width: float
    """Of the 95 % interval; infinite where there is one trunk."""
    count: int

    def __str__(self) -> str:
        if not self.count:
            return ""
        return f"{self.mean:+.1f} ± {self.half_width:.1f}" if self.count > 1 else f"{self.mean:+.1f}"


def difference(results: list[Result], arm: str, other: str, *, measure: str) -> Difference:
    """Mean of `arm` less `other` within a trunk, and its 95 % interval.

    Args:
        results: of one data set.
        arm: that is compared.
        other: that it is compared with.
        measure: key of a result, in percent.
    """
    base = {result["seed"]: result[measure] for result in results if result["arm"] == other}
    apart = [r[measure] - base[r["seed"]] for r in results if r["arm"] == arm and r["seed"] in base]
    count = len(apart)
    if arm == other or not count:
        return Difference(0.0, 0.0, 0)
    if count == 1:
        return Difference(float(apart[0]), float("inf"), 1)
    half = float(stats.t.ppf(0.975, count - 1)) * float(np.std(apart, ddof=1)) / count**0.5
    return Difference(float(np.mean(apart)), half, count)


def write_report(results: list[Result], *, settings: PretrainSettings) -> dict[str, Any]:
    """Writes `ablation.json` and `ablation.png`, and the tables into vmoco/METHOD.md between its two markers.

    Args:
        results: one for each data set, arm and seed that are done.
        settings: what all arms share.

    Returns:
        By data set and arm: mean accuracy of the linear probe, its difference to MoCo and to random dropping with the
        half width of the 95 % interval, trunks and CPU minutes; for the last line of the benchmark.
    """
    by_data = {data: [r for r in results if r["data"] == data] for data in dict.fromkeys(r["data"] for r in results)}
    RESULTS.mkdir(exist_ok=True)
    content = {"settings": settings.content(), "results": results}
    (RESULTS / "ablation.json").write_text(json.dumps(content, indent=1) + "\n")
    before, rest = METHOD.read_text().split(_BEGIN)
    tables = "\n".join(f"`{data}`:\n\n{_table(found)}" for data, found in by_data.items())
    METHOD.write_text(before + _BEGIN + tables + _END + rest.split(_END)[1])
    _plot(by_data)
    return {
        data: {
            arm: {
                "linear": round(_mean(found, arm, "linear_test"), 1),
                **{
                    name: [round(float(value), 2) for value in apart[:2]]
                    for name, other in (("to_moco", REFERENCE), ("to_random_dropping", CONTROL))
                    if (apart := difference(found, arm, other, measure="linear_test")).count > 1
                },
                "trunks": len(_of(found, arm)),
                "cpu_minutes": round(_mean(found, arm, "cpu_seconds") / 60, 1),
            }
            for arm in _arms(found)
        }
        for data, found in by_data.items()
    }


def _table(results: list[Result]) -> str:
    """Markdown, one row for each arm."""
    lines = [
        f"| arm | trunks | linear probe, % | less {REFERENCE} | less {CONTROL} | kNN, % | kNN less {REFERENCE} | "
        "entropy of drops | CPU minutes a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in _arms(results):
        runs = _of(results, arm)
        entropies = [run["dropped"]["dropped_entropy"] for run in runs if run["dropped"]]
        cells = [
            arm,
            str(len(runs)),
            f"{_mean(results, arm, 'linear_test'):.1f}",
            str(difference(results, arm, REFERENCE, measure="linear_test")),
            str(difference(results, arm, CONTROL, measure="linear_test")),
            f"{_mean(results, arm, 'knn_test'):.1f}",
            str(difference(results, arm, REFERENCE, measure="knn_test")),
            f"{np.mean(entropies):.3f}" if entropies else "",
            f"{_mean(results, arm, 'cpu_seconds') / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arms(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(result["arm"] for result in results))


def _of(results: list[Result], arm: str) -> list[Result]:
    return [result for result in results if result["arm"] == arm]


def _mean(results: list[Result], arm: str, measure: str) -> float:
    return float(np.mean([result[measure] for result in _of(results, arm)]))


def _plot(by_data: dict[str, list[Result]]) -> None:
    """A panel for each data set: each arm's difference to MoCo, trunk by trunk, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(
        dict.fromkeys(arm for found in by_data.values() for arm in _arms(found) if arm.startswith(("MoCo +", "V")))
    )
    figure, axes = pyplot.subplots(
        1, len(by_data), figsize=(2.6 + 2.7 * len(by_data), 0.9 + 0.34 * len(arms)), sharey=True, layout="constrained"
    )
    places = np.arange(len(arms))[::-1]
    for axis, (data, found) in zip(np.atleast_1d(axes), by_data.items(), strict=True):
        base = {result["seed"]: result["linear_test"] for result in _of(found, REFERENCE)}
        for place, arm in zip(places, arms, strict=True):
            apart = difference(found, arm, REFERENCE, measure="linear_test")
            each = [run["linear_test"] - base[run["seed"]] for run in _of(found, arm) if run["seed"] in base]
            axis.plot(each, np.full(len(each), place), "o", color="#8fb0d6", markersize=3.5)
            if apart.count > 1:
                axis.errorbar(apart.mean, place, xerr=apart.half_width, fmt="|", color="#20406a", capsize=3)
        axis.axvline(0, color="#888888", linewidth=1, linestyle=":")
        axis.set_title(data, fontsize=9)
        axis.set_xlabel("points above MoCo, linear probe", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_yticks(places, [arm.replace("MoCo + ", "") for arm in arms])
    # No date and no version in the file: equal results give equal bytes.
    figure.savefig(RESULTS / "ablation.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
