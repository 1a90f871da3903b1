"""The comparison with random weights uses the same clips for both, equals a plain reference, and makes a page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import title_of
from tests.dataset import make_data_set
from tests.made import encoder_of, save_checkpoint
from vmoco.data.manifest import Manifest
from vmoco.encoders.foreign import random_initialisation
from vmoco.evaluate.before_after import AFTER, BEFORE, COLUMNS, compare, found, write_page
from vmoco.evaluate.features import window
from vmoco.evaluate.motion import ENCODER, colour_features, make_views, measure_probes, plan_motion, read_colours
from vmoco.evaluate.motion_probes import probe_encoder
from vmoco.evaluate.score import Answers, Estimate, TooFewVideosError, score_encoder
from vmoco.train.publish import write_encoder

ROOT = Path(__file__).parents[2]
PROBE = """<script>addEventListener("load", () => {
  const all = [...document.images];
  document.title = [all.filter(image => image.complete && image.naturalWidth > 0).length - all.length,
                    document.querySelectorAll("section").length, document.querySelectorAll("tr").length,
                    document.documentElement.scrollWidth <= innerWidth].join(" ");
});</script>"""


def test_random_weights_beside_random_weights(tmp_path: Path) -> None:
    """The encoder that is random itself scores the same as before; the first row is the label-free score."""
    manifest = make_data_set(tmp_path, num_held_out=5)
    encoder = random_initialisation(encoder_of(), seed=3)
    same = compare(encoder, manifest, seed=3)
    assert [row.before for row in same.rows] == [row.after for row in same.rows]
    assert {row.difference for row in same.rows} == {Estimate(0.0, 0.0, 0.0)}
    assert same.rows[0].cells()[-1] == "+0.0 [+0.0, +0.0]"
    assert {len(row.cells()) for row in same.rows} == {len(COLUMNS)}
    other = compare(encoder, manifest, seed=4)
    assert [row.after for row in other.rows] == [row.after for row in same.rows]
    assert other.rows[1].before != same.rows[1].before
    score = score_encoder(encoder, manifest)
    assert same.rows[0].after == score.retrieval
    assert (same.rows[0].chance, same.rows[1].chance) == (1 / 5, 1 / 10)
    assert (same.num_videos, same.num_clips) == (5, 10)
    assert [note.partition(":")[0] for note in same.notes] == ["no probes of motion"]


def test_a_difference_is_paired() -> None:
    """Two encoders of which one is right wherever the other is, and once more in each video: +20 points for sure."""
    one, other = np.tile([1.0, 0, 0, 0, 0], 8), np.tile([1.0, 0, 1, 0, 0], 8)
    one[:20], other[:20] = 1 - one[:20], 1 - other[:20]
    videos = np.repeat(np.arange(8), 5)
    worse, better = Answers(np.minimum(one, other), videos), Answers(np.maximum(one, other), videos)
    assert worse.estimate().high > better.estimate().low
    assert better.above(worse) == pytest.approx(Estimate(0.2, 0.2, 0.2))
    assert worse.above(better) == pytest.approx(Estimate(-0.2, -0.2, -0.2))


def test_colour_finds_what_differs_in_colour(tmp_path: Path) -> None:
    """Each generated video has a square of its own colour over noise, so mean colour is far above chance."""
    rows = compare(encoder_of(), make_data_set(tmp_path, num_held_out=5)).rows
    assert rows[0].by_colour > 3 * rows[0].chance
    assert rows[1].by_colour > 3 * rows[1].chance


def test_a_match_is_the_largest_of_its_row_and_column() -> None:
    """The result equals that of a loop over rows and columns."""
    similarity = np.random.default_rng(0).normal(size=(6, 6)) + 0.8 * np.eye(6)
    rows = [float(all(similarity[i, i] >= similarity[i, j] for j in range(6))) for i in range(6)]
    columns = [float(all(similarity[j, j] >= similarity[i, j] for i in range(6))) for j in range(6)]
    assert found(similarity).tolist() == rows + columns
    assert 0 < found(similarity).mean() < 1


def test_probes_of_motion_stand_beside_the_searches(tmp_path: Path) -> None:
    """With enough videos, the figures are those of the protocol; the gain is paired."""
    manifest, encoder = make_data_set(tmp_path, num_videos=24, num_frames=16, num_held_out=12), encoder_of()
    found = compare(encoder, manifest, seed=1)
    rows = {row.name: row for row in found.rows[2:]}
    assert list(rows) == ["playback speed, by a probe", "order of halves, by a probe"]
    speed, order = rows.values()
    assert speed.after.value == probe_encoder(encoder, manifest, max_clips=1000)["speed"]
    untrained = random_initialisation(encoder, seed=1)
    assert order.before.value == probe_encoder(untrained, manifest, max_clips=1000)["order"]
    chosen = plan_motion(manifest)
    colours, _ = read_colours(manifest, chosen.rows)
    views = make_views(window(encoder, manifest), 16)
    assert [row.by_colour for row in (speed, order)] == [
        each.by[ENCODER].value for each in measure_probes({ENCODER: colour_features(colours, views)}, chosen, views)
    ]
    assert (speed.chance, order.chance) == (1 / 3, 1 / 2)
    assert speed.difference.value == pytest.approx(speed.after.value - speed.before.value)
    assert {len(row.cells()) for row in found.rows} == {len(COLUMNS)}


def test_too_few_held_out_videos_have_a_page_without_scores(tmp_path: Path) -> None:
    """With one held-out video there is no other to confuse it with: its clips are shown; a single clip is refused."""
    manifest, encoder = make_data_set(tmp_path / "one", num_held_out=1), encoder_of()
    found = compare(encoder, manifest)
    assert found.rows == ()
    assert found.notes[0].startswith("no scores: 1 of 1 held-out videos")
    write_page(tmp_path / "page.html", encoder, manifest, found, title="one video")
    text = (tmp_path / "page.html").read_text()
    assert text.count(f"<h3>{AFTER}</h3>") == 2
    assert "No scores: 1 of 1 held-out videos" in text
    assert "<table>" not in text
    with pytest.raises(TooFewVideosError, match="0 clips are held out, and a comparison needs two"):
        compare(encoder, make_data_set(tmp_path / "none"))


def test_the_job_says_what_is_missing(tmp_path: Path) -> None:
    """With one held-out video it prints why there are no scores, and the page; with none it names the flag to raise."""
    folder, page = tmp_path / "encoder", tmp_path / "pages" / "page.html"
    trained = make_data_set(tmp_path / "trained")
    save_checkpoint(tmp_path / "checkpoint", trained)
    write_encoder(tmp_path / "checkpoint", folder, data=trained)

    def run(manifest: Manifest) -> list[str]:
        command = [sys.executable, "jobs/compare.py", str(folder), "--data", manifest.uri, "--page", str(page)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    why, where = run(make_data_set(tmp_path / "one", num_held_out=1))
    assert why.startswith("note: no scores: 1 of 1 held-out videos")
    assert where.endswith(page.as_uri())
    assert page.exists()
    page.unlink()
    (why,) = run(make_data_set(tmp_path / "none"))
    assert why.startswith("note: no scores and no page: 0 clips are held out")
    assert "--held-out-percent" in why
    assert not page.exists()


def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    """Table, curve and all thumbnails are in the file, the page fits the window; the name is text."""
    manifest = make_data_set(tmp_path / "data", num_held_out=5)
    encoder = encoder_of()
    Image.new("RGB", (50, 26)).save(tmp_path / "loss.png")
    page = tmp_path / "page" / "page.html"
    compared = compare(encoder, manifest)
    write_page(page, encoder, manifest, compared, title="models:/<b>&@x", loss=tmp_path / "loss.png")
    text = page.read_text()
    assert "models:/&lt;b&gt;&amp;@x" in text
    assert text.count(f"<h3>{BEFORE}</h3>") == text.count(f"<h3>{AFTER}</h3>") == 8
    assert 'alt="loss curve"' in text
    copy = page.with_name("probed.html")
    copy.write_text(text.replace("</body>", PROBE + "</body>"))
    missing, sections, lines, fits = title_of(copy, profile=tmp_path / "profile").split()
    assert (missing, sections, lines, fits) == ("0", "8", "3", "true")
