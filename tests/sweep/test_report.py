"""The report of a sweep in a real browser, and its pictures; with trials of every kind."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import title_of
from vmoco.sweep.record import Sweep, Trial
from vmoco.sweep.report import page, pictures

PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const drawn = [...document.querySelectorAll(".js-plotly-plot")].filter(plot => plot.querySelector("svg.main-svg"));
  document.title = [drawn.length, document.querySelectorAll("tr").length - 1, document.querySelectorAll(".best").length,
                    document.documentElement.scrollWidth <= innerWidth].join(" ");
}, 500));</script>"""


@pytest.fixture
def sweep() -> Sweep:
    """Six trials over ratio and decay: four finished, one stopped, and one failed with markup in its reason."""
    found = Sweep("night", "/nowhere", "c", "retrieval", "abc")
    for place, (ratio, decay) in enumerate([(r, d) for r in (0.0, 0.25, 0.5) for d in ("none", "linear")]):
        trial = Trial(f"night-{place:03d}", {"generator.drop_ratio": ratio, "decay": decay}, 20, "finished", 20)
        trial.scores = {"score/retrieval": 0.5 + place / 20, "score/effective_rank": 9.0}
        trial.scores["score/retrieval_by_colour"] = 0.4
        found.trials.append(trial)
    found.trials[4].status = "stopped"
    found.trials[5] = Trial("night-005", found.trials[5].values, 20, "failed", 3, reason="a loss is <b>nan</b>")
    return found


@pytest.fixture
def curves(sweep: Sweep) -> dict[str, list[tuple[int, float]]]:
    return {trial.name: [(10, 0.4), (20, trial.scores.get("score/retrieval", 0.1))] for trial in sweep.trials}


def test_a_browser_draws_every_plot_without_a_network(
    sweep: Sweep, curves: dict[str, list[tuple[int, float]]], tmp_path: Path
) -> None:
    """Heat map, parallel coordinates, learning curves and decay are drawn; the table has each trial; it all fits."""
    text = page(sweep, curves, [(1, 0.999), (20, 1.0)])
    assert "a loss is &lt;b&gt;nan" in text
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text), "one file, without a network"
    assert "Best by retrieval: night-003" in text, "only what has trained to its end can be the best"
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", PROBE + "</body>"))
    assert title_of(path, profile=tmp_path / "profile") == "4 6 1 true"


def test_where_nothing_beats_mean_colour_the_report_says_so(
    sweep: Sweep, curves: dict[str, list[tuple[int, float]]]
) -> None:
    """A score below the baseline shows nothing learned, whichever trial is the best."""
    assert "no trial shows" not in page(sweep, curves, [])
    for trial in sweep.trials:
        trial.scores["score/retrieval_by_colour"] = 0.9
    assert "Mean colour alone reaches 0.900, so no trial shows" in page(sweep, curves, [])


def test_a_population_shows_the_schedule_that_it_found(sweep: Sweep) -> None:
    """The values of the best and of those that it descends from, by steps; the best is of the newest generation."""
    for trial in sweep.trials[:4]:
        trial.steps = trial.step = 10
    child = Trial("night-006", {"generator.drop_ratio": 0.5, "decay": "linear"}, 20, "finished", 20)
    child.generation, child.fork, child.scores = 1, "/runs/trials/night-002/step-00000010", {"score/retrieval": 0.1}
    sweep.trials.append(child)
    assert sweep.best() is child
    rows = re.findall(r"<td>(\d+ to \d+)</td><td>(.*?)</td><td>(.*?)</td>", page(sweep, {}, []))
    assert rows == [("0 to 10", "night-002", "0.25"), ("10 to 20", "night-006", "0.5")]


def test_a_sweep_that_begins_from_a_checkpoint_has_a_report(sweep: Sweep) -> None:
    """With --run.fork each trial begins from a checkpoint of another run and descends from no trial."""
    for trial in sweep.trials:
        trial.fork = "/runs/before/step-00000010"
    best = sweep.best()
    assert best is not None
    assert sweep.lineage(best) == [best]
    assert "Best by retrieval: night-003" in page(sweep, {}, [])


def test_the_pictures_are_pictures(sweep: Sweep, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Both PNGs decode and are not blank; a sweep without scores has none."""
    drawn = pictures(sweep, curves)
    assert set(drawn) == {"scores.png", "curves.png"}
    for content in drawn.values():
        colours = Image.open(io.BytesIO(content)).convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 20
    for place, trial in enumerate(sweep.trials):
        trial.values = {"moco.decay": 0.9 + place / 100, "moco.momentum": 0.99 - place / 100}
    assert set(pictures(sweep, {})) == {"scores.png"}, "scattered trials are points"
    assert "moco.momentum" in page(sweep, curves, [])
    for trial in sweep.trials:
        trial.scores = {}
    assert pictures(sweep, {}) == {}
    assert "None has finished" in page(sweep, {}, [])
