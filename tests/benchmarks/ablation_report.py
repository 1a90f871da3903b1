"""Tables and plot of the ablation: each arm beside plain MoCo and beside random dropping, within a trunk.

Arms that start from the same trunk share everything but what is compared, so their difference is taken trunk by trunk.
The interval is Student's, over trunks. It says nothing about other networks, data or lengths of training. A report of
runs that are only partly done is valid: each difference counts the trunks that have both arms, and says how many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vmoco.config import PretrainSettings

RESULTS = Path(__file__).parent / "results"
TRUNK = "trunk: MoCo, 700 steps"
FROM_SCRATCH = (TRUNK, "random initialisation", "supervised")
"""Runs that do not start from a trunk."""
REFERENCE, CONTROL = "MoCo", "MoCo + random dropping"
ADVERSARY = "MoCo + adversarial dropping"
"""How the name of every adversarial arm begins."""
PAIRS = (
    (f"{ADVERSARY}, relative", ADVERSARY),
    (f"{ADVERSARY}, relative, sampled", f"{ADVERSARY}, relative"),
    (f"{ADVERSARY}, relative, contrast", f"{ADVERSARY}, relative"),
    (f"{ADVERSARY}, relative, every 4th step", f"{ADVERSARY}, relative"),
    (f"{ADVERSARY}, relative, sampled, contrast", f"{ADVERSARY}, relative, sampled"),
    ("MoCo + two clips + random dropping", "MoCo + two clips"),
    ("MoCo, old keys", "MoCo, momentum 0.9"),
    ("MoCo, old keys + decay", "MoCo, old keys"),
    ("MoCo, old keys + two clips", "MoCo, old keys"),
    ("MoCo, old keys + random dropping", "MoCo, old keys"),
    ("VideoMoCo (adversarial dropping + decay)", ADVERSARY),
    ("VideoMoCo, old keys", "VideoMoCo (adversarial dropping + decay)"),
    ("VideoMoCo, old keys", "MoCo, old keys + decay"),
    ("MoCo, old keys + random dropping", "VideoMoCo (adversarial dropping + decay)"),
    ("MoCo, old keys + random dropping", "VideoMoCo, old keys"),
    ("MoCo, old keys + random dropping, twice the steps", "VideoMoCo, old keys"),
)
"""An arm, and the arm that lacks only one part of it; at the end the best recipe and the paper's form, which differ in
more than one. With twice the steps the recipe takes the CPU time of the paper's form."""
LONGER = "twice the steps"
"""How the name of an arm ends that has more steps than the others, so it takes no part in the choice."""
CHOOSING = ("doom", "moments")
"""Data sets whose validation parts choose an arm together; on the others it is only tested."""
ENOUGH = 3
"""Fewest trunks with which an arm can be chosen by the validation part."""
METHOD = Path(__file__).parents[2] / "vmoco/METHOD.md"
_BEGIN, _END = "<!-- ablation: written by tests.benchmarks.ablation -->\n", "<!-- /ablation -->"
_KEPT = ("data", "arm", "seed", "cpu_seconds", "linear_validation", "knn_validation", "linear_test", "knn_test")

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
        mean = round(self.mean, 1) + 0.0  # never -0.0
        return f"{mean:+.1f} ± {self.half_width:.1f}" if self.count > 1 else f"{mean:+.1f}"

    def as_json(self) -> dict[str, float | int]:
        """Mean and the ends of the interval, which one trunk does not have."""
        found: dict[str, float | int] = {"mean": round(self.mean, 2), "trunks": self.count}
        if self.count > 1:
            found |= {"low": round(self.mean - self.half_width, 2), "high": round(self.mean + self.half_width, 2)}
        return found


class Choice(NamedTuple):
    """The arm that the validation part chooses, and what the test part says of it."""

    arm: str
    validation: Difference
    test: Difference


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


def choose(results: list[Result], other: str, *, allowed: Callable[[str], bool]) -> Choice | None:
    """The arm with the largest mean difference to `other` on the validation part; None if no arm has enough trunks.

    Args:
        results: of one data set.
        other: what arms are compared with.
        allowed: says of an arm's name whether it takes part.
    """
    found = [
        Choice(arm, validation, difference(results, arm, other, measure="linear_test"))
        for arm in _arms(results)
        if allowed(arm) and (validation := difference(results, arm, other, measure="linear_validation")).count >= ENOUGH
    ]
    return max(found, key=lambda choice: choice.validation.mean, default=None)


def choose_together(by_data: dict[str, list[Result]]) -> dict[str, Choice]:
    """What each data set says of the arm with the largest mean gain over MoCo on the validation parts of CHOOSING.

    Empty where no arm has enough trunks on all of these.
    """
    sets = [by_data.get(data, []) for data in CHOOSING]
    gains: dict[str, float] = {}
    for arm in dict.fromkeys(arm for found in sets for arm in _arms(found) if _may_be_chosen(arm)):
        apart = [difference(found, arm, REFERENCE, measure="linear_validation") for found in sets]
        if min(each.count for each in apart) >= ENOUGH:
            gains[arm] = float(np.mean([each.mean for each in apart]))
    if not gains:
        return {}
    best = max(gains, key=lambda arm: gains[arm])
    parts = ("linear_validation", "linear_test")
    return {
        data: Choice(best, *(difference(found, best, REFERENCE, measure=part) for part in parts))
        for data, found in by_data.items()
        if best in _arms(found)
    }


def write_report(results: list[Result], *, settings: PretrainSettings) -> dict[str, Any]:
    """Writes `ablation.json` and `ablation.png`, and the tables into vmoco/METHOD.md between its two markers.

    Args:
        results: one for each data set, arm and seed that are done.
        settings: what all arms share.

    Returns:
        By data set and arm: mean accuracy of the linear probe on the test part, its differences to MoCo and to random
        dropping with their 95 % intervals, seeds, hardness and CPU minutes; what the validation parts choose, alone and
        together; and the hours of one core of all runs. For the last line of the benchmark.
    """
    by_data = {data: [r for r in results if r["data"] == data] for data in dict.fromkeys(r["data"] for r in results)}
    RESULTS.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(_row(result)) for result in results)
    content = json.dumps(settings.content())
    together = choose_together(by_data)
    summary: dict[str, Any] = {data: _line(found) for data, found in by_data.items()}
    summary["chosen on validation together"] = {data: _as_json(choice) for data, choice in together.items()}
    summary["core_hours"] = round(sum(result["cpu_seconds"] for result in results) / 3600, 1)
    lines = f'"settings": {content},\n"summary": {json.dumps(summary)},\n"results": [\n{rows}\n]'
    (RESULTS / "ablation.json").write_text(f"{{{lines}}}\n")
    text = "\n".join([*map(tables, by_data.values()), *([_together(together)] if together else [])])
    before, rest = METHOD.read_text().split(_BEGIN)
    METHOD.write_text(before + _BEGIN + text + _END + rest.split(_END)[1])
    plot(by_data, RESULTS / "ablation.png")
    return summary


def _together(together: dict[str, Choice]) -> str:
    """What the arm that all validation parts choose together has, as one paragraph."""
    chosen = next(iter(together.values())).arm
    each = [
        f"`{data}` {choice.test} on test, {choice.validation} on validation ({choice.test.count} trunks)"
        for data, choice in together.items()
    ]
    names = " and ".join(f"`{data}`" for data in CHOOSING)
    return f"**Chosen on validation over {names} together: {chosen}.** Points to {REFERENCE}: {'; '.join(each)}.\n"


def tables(results: list[Result]) -> str:
    """Markdown of one data set: a row for each arm, the differences of further pairs, and the choice by validation."""
    lines = [
        f"**`{results[0]['data']}`**",
        "",
        "| arm | trunks | linear probe, % | less MoCo | less random dropping | kNN, % | kNN, less MoCo | hardness | "
        "CPU minutes a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in _arms(results):
        runs = _of(results, arm)
        cells = [
            arm,
            str(len(runs)),
            f"{_mean(results, arm, 'linear_test'):.1f}",
            _cell(results, arm, REFERENCE),
            _cell(results, arm, CONTROL),
            f"{_mean(results, arm, 'knn_test'):.1f}",
            _cell(results, arm, REFERENCE, measure="knn_test"),
            "" if (hardness := _hardness(runs)) is None else f"{hardness:.2f}",
            f"{_mean(results, arm, 'cpu_seconds') / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    pairs = [(arm, other) for arm, other in PAIRS if difference(results, arm, other, measure="linear_test").count]
    if pairs:
        lines += ["", "| arm | less | difference in the linear probe | trunks |", "|---|---|---|---|"]
        for arm, other in pairs:
            apart = difference(results, arm, other, measure="linear_test")
            lines.append(f"| {arm} | {other} | {apart} | {apart.count} |")
    for what, other, chosen in _choices(results):
        lines += [
            "",
            f"Chosen on validation {what}: {chosen.arm} ({chosen.validation} there). "
            f"On test it has {chosen.test} points to {other} ({chosen.test.count} trunks).",
        ]
    return "\n".join(lines) + "\n"


def plot(by_data: dict[str, list[Result]], path: Path) -> None:
    """A panel for each data set: each arm's difference to MoCo, trunk by trunk, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(arm for found in by_data.values() for arm in _arms(found) if _is_forked(arm)))
    figure, axes = pyplot.subplots(
        1, len(by_data), figsize=(3.2 + 2.5 * len(by_data), 1.0 + 0.27 * len(arms)), sharey=True, layout="constrained"
    )
    places = np.arange(len(arms))[::-1]
    for axis, (data, found) in zip(np.atleast_1d(axes), by_data.items(), strict=True):
        base = {result["seed"]: result["linear_test"] for result in _of(found, REFERENCE)}
        each_arm = [[r["linear_test"] - base[r["seed"]] for r in _of(found, arm) if r["seed"] in base] for arm in arms]
        # The interval of two trunks is 13 times their spread: it would hide all others.
        reach = 1.15 * max([1.0, *(abs(value) for each in each_arm for value in each)])
        axis.set_xlim(-reach, reach)
        for place, arm, each in zip(places, arms, each_arm, strict=True):
            axis.plot(each, np.full(len(each), place), "o", color="#8fb0d6", markersize=3.5)
            apart = difference(found, arm, REFERENCE, measure="linear_test")
            if apart.count > 1:
                axis.errorbar(apart.mean, place, xerr=apart.half_width, fmt="|", color="#20406a", capsize=3)
            if apart.count:
                axis.text(1.01, place, str(apart.count), fontsize=7, va="center", transform=axis.get_yaxis_transform())
        axis.axvline(0, color="#888888", linewidth=1, linestyle=":")
        axis.set_title(f"{data} (right: trunks)", fontsize=9)
        axis.set_xlabel("points above MoCo, linear probe", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_yticks(places, [arm.replace("MoCo + ", "") for arm in arms])
    # No date and no version in the file: equal results give equal bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _row(result: Result) -> Result:
    """What is kept of a result beside the benchmark."""
    metrics, dropped = result.get("metrics", {}), result.get("dropped", {})
    more = {
        "hardness": result.get("hardness"),
        "dropped_entropy": dropped.get("dropped_entropy"),
        "oldest_key_similarity": metrics.get("oldest_key_similarity"),
    }
    return {key: result[key] for key in _KEPT} | {key: round(v, 3) for key, v in more.items() if v is not None}


def _line(results: list[Result]) -> dict[str, Any]:
    arms = {}
    for arm in _arms(results):
        runs = _of(results, arm)
        arms[arm] = {
            "linear": round(_mean(results, arm, "linear_test"), 1),
            **{
                name: apart.as_json()
                for name, other in (("to_moco", REFERENCE), ("to_random_dropping", CONTROL))
                if (apart := difference(results, arm, other, measure="linear_test")).count
            },
            "seeds": sorted(run["seed"] for run in runs),
            "hardness": _hardness(runs),
            "cpu_minutes": round(_mean(results, arm, "cpu_seconds") / 60, 1),
        }
    chosen = {what: _as_json(choice) | {"to": other} for what, other, choice in _choices(results)}
    return {"arms": arms, "chosen_on_validation": chosen}


def _as_json(choice: Choice) -> dict[str, Any]:
    return {"arm": choice.arm, "validation": choice.validation.as_json(), "test": choice.test.as_json()}


def _choices(results: list[Result]) -> list[tuple[str, str, Choice]]:
    """What is chosen, what it is compared with, and the choice."""
    kinds = (
        ("among all arms", REFERENCE, _may_be_chosen),
        ("among adversarial arms", CONTROL, lambda arm: arm.startswith(ADVERSARY)),
    )
    found = [(what, other, choose(results, other, allowed=allowed)) for what, other, allowed in kinds]
    return [(what, other, choice) for what, other, choice in found if choice is not None]


def _is_forked(arm: str) -> bool:
    """Whether an arm starts from a trunk, and is not what arms are compared with."""
    return arm.startswith((f"{REFERENCE} +", f"{REFERENCE},", "VideoMoCo"))


def _may_be_chosen(arm: str) -> bool:
    return _is_forked(arm) and not arm.endswith(LONGER)


def _cell(results: list[Result], arm: str, other: str, *, measure: str = "linear_test") -> str:
    """A difference; with its trunks where they are fewer than the arm has."""
    apart = difference(results, arm, other, measure=measure)
    fewer = 0 < apart.count < len(_of(results, arm))
    return f"{apart} ({apart.count} trunks)" if fewer else str(apart)


def _arms(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result["arm"] for result in results))


def _of(results: list[Result], arm: str) -> list[Result]:
    return [result for result in results if result["arm"] == arm]


def _mean(results: list[Result], arm: str, measure: str) -> float:
    return float(np.mean([result[measure] for result in _of(results, arm)]))


def _hardness(runs: list[Result]) -> float | None:
    found = [run["hardness"] for run in runs if run.get("hardness") is not None]
    return round(float(np.mean(found)), 3) if found else None
