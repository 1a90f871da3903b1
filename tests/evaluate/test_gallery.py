"""The gallery shows the nearest clips and a map, in one file that a browser opens without a network."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import title_of
from tests.data.videos import images, write_video
from tests.dataset import damage_clip, upload
from tests.embeddings import embedded, labelled_data_set
from tests.made import encoder_of
from vmoco.evaluate.embed import sliding_window
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Window
from vmoco.evaluate.gallery import flatten, write_gallery
from vmoco.evaluate.table import FeatureTable
from vmoco.job_settings import EmbedSettings

PROBE = """<script>addEventListener("load", () => {
  const all = [...document.images];
  document.title = [all.length, all.filter(image => image.complete && image.naturalWidth > 0).length,
                    document.querySelectorAll("circle").length,
                    document.documentElement.scrollWidth <= innerWidth].join(" ");
});</script>"""
"""Run when the page has loaded: a picture that cannot be decoded has no width."""


def test_a_browser_shows_every_thumbnail_and_point(tmp_path: Path) -> None:
    """All pictures decode, each clip is a point of the map, the page fits the window, and it loads no other file."""
    manifest = labelled_data_set(tmp_path / "data")
    encoder = encoder_of()
    table = embedded(encoder, manifest, tmp_path / "table")
    settings = EmbedSettings(videos=manifest.uri, output=str(tmp_path / "table"), queries=4)
    page = Path(write_gallery(table, encoder, settings, title="models:/<b>&@x"))
    text = page.read_text()
    assert "models:/&lt;b&gt;&amp;@x" in text
    assert not re.findall(r"(?:src|href)=.(?!data:)", text), "one file, without a network"
    copy = page.with_name("probed.html")
    copy.write_text(text.replace("</body>", PROBE + "</body>"))
    pictures, decoded, points, fits = title_of(copy, profile=tmp_path / "profile").split()
    assert int(pictures) == int(decoded) == 4 * 7
    assert int(points) == len(table)
    assert fits == "true"


def test_a_damaged_clip_is_refused(tmp_path: Path) -> None:
    """A clip that has changed on disk since it was embedded is not shown."""
    manifest = labelled_data_set(tmp_path / "data", num_videos=4)
    encoder = encoder_of()
    table = embedded(encoder, manifest, tmp_path / "table")
    settings = EmbedSettings(videos=manifest.uri, output=str(tmp_path / "table"), queries=8)
    with pytest.raises(ValueError, match=damage_clip(manifest, 3)):
        write_gallery(table, encoder, settings, title="t")


def test_clips_that_have_left_the_data_set_are_named(tmp_path: Path) -> None:
    """The data set was made again with other videos: the message says what to run."""
    manifest = labelled_data_set(tmp_path / "data", num_videos=8)
    encoder = encoder_of()
    table = embedded(encoder, manifest, tmp_path / "table")
    labelled_data_set(tmp_path / "data", num_videos=4)
    settings = EmbedSettings(videos=manifest.uri, output=str(tmp_path / "table"), queries=16)
    with pytest.raises(ValueError, match=r"clip \w{16} of '.*' is no longer in data set .*: run jobs/embed.py"):
        write_gallery(table, encoder, settings, title="t")


def test_a_remote_data_set_is_shown_clip_by_clip(tmp_path: Path, store: Any) -> None:
    """The page equals that of the local data set, and no complete shard is fetched."""
    manifest = labelled_data_set(tmp_path / "data", num_videos=4)
    far = upload(manifest, "s3://bucket/set")
    encoder = encoder_of()
    table = embedded(encoder, manifest, tmp_path / "table")
    pages = []
    for each in (manifest, far):
        settings = EmbedSettings(videos=each.uri, output=str(tmp_path / "table"), queries=4)
        pages.append(Path(write_gallery(table, encoder, settings, title="t")).read_text().replace(each.uri, ""))
    assert pages[0] == pages[1]


def test_the_pictures_move_and_are_of_the_clips_they_name(tmp_path: Path) -> None:
    """In a folder of videos: the first picture of a row shows the query's own frames; each picture moves."""
    for name in range(4):
        numbered = [np.full_like(image, 60 * name) // 2 + image // 2 for image in images(24)]
        write_video(tmp_path / "videos" / f"{name}.mp4", numbered)
    encoder = encoder_of()
    settings = EmbedSettings(videos=str(tmp_path / "videos"), output=str(tmp_path / "table"), queries=4)
    task = EmbedTask(encoder, Work(output=settings.output, window=Window(8, 1), batch_size=4))
    sizes = [[f"{name}.mp4", (tmp_path / "videos" / f"{name}.mp4").stat().st_size] for name in range(4)]
    plan = f'{{"folder": "{settings.videos}", "videos": {sizes}}}'.replace("'", '"')
    assert task({"part": "all", "plan": plan}) == {"clips": 12, "error": ""}
    page = Path(write_gallery(FeatureTable(settings.output), encoder, settings, title="t")).read_text()
    rows = page.split('<div class="row">')[1:]
    assert len(rows) == 4
    for row in rows:
        found = re.search(r'src="data:image/webp;base64,([^"]+)" alt="(\d).mp4 @', row)
        assert found is not None
        path = tmp_path / "picture.webp"
        path.write_bytes(base64.b64decode(found[1]))
        with Image.open(path) as picture:
            assert picture.n_frames > 1
            background = picture.convert("L").getpixel((3, 3))
        assert abs(background - (30 * int(found[2]) + 64)) < 8, "the picture is of the video that it names"


def test_nearest_are_nearest_and_never_the_clip_itself(tmp_path: Path) -> None:
    """The result equals that of all cosines in numpy, also if one clip appears twice."""
    from tests.embeddings import table_of
    from vmoco.evaluate.gallery import _nearest

    features = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    features[11] = features[10]
    table = table_of(tmp_path, features, ["a"] * 30)
    queries, rows, cosines = _nearest(table, 30)
    apart = features - features.mean(axis=0)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    every = apart @ apart.T
    np.fill_diagonal(every, -2)
    assert queries.tolist() == list(range(30))
    assert (rows != queries[:, None]).all()
    np.testing.assert_allclose(cosines, -np.sort(-every, axis=1)[:, :6], atol=1e-5)
    assert rows[10, 0] == 11


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_map_of_any_number_of_clips_fits_the_page(count: int) -> None:
    """All points are finite and inside the frame; groups that are far apart stay apart."""
    features = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    features[: count // 2] += 20
    at = flatten(features)
    assert at.shape == (count, 2)
    assert np.isfinite(at).all()
    assert (at >= 0).all()
    assert (at <= (1000, 600)).all()
    if count == 40:
        gap = np.linalg.norm(at[:20].mean(axis=0) - at[20:].mean(axis=0))
        assert gap > np.linalg.norm(at[:20] - at[:20].mean(axis=0), axis=1).mean()


def test_the_pictures_of_a_sliding_window(tmp_path: Path) -> None:
    """A picture shows the clip that begins at the second which stands below it."""
    brightness = np.repeat(np.arange(20, 240, 20), 8)  # a step every 0.32 s, the length of a clip
    frames = [np.full((72, 96, 3), value, np.uint8) for value in brightness]
    path = write_video(tmp_path / "videos" / "a.mp4", frames)
    encoder = encoder_of()
    settings = EmbedSettings(
        videos=str(path.parent), output=str(tmp_path / "table"), queries=5, batch_size=2, every_seconds=0.32
    )
    task = EmbedTask(
        encoder,
        Work(output=settings.output, window=Window(8, 1), batch_size=2, sliding=sliding_window(encoder, settings)),
    )
    plan = f'{{"folder": "{settings.videos}", "videos": [["a.mp4", {path.stat().st_size}]]}}'
    assert task({"part": "all", "plan": plan}) == {"clips": 11, "error": ""}
    page = Path(write_gallery(FeatureTable(settings.output), encoder, settings, title="t")).read_text()
    found = re.findall(r'src="data:image/webp;base64,([^"]+)" alt="a.mp4 @ ([\d.]+) s', page)
    assert len(found) == 5 * 7
    for picture, start in found:
        (tmp_path / "picture.webp").write_bytes(base64.b64decode(picture))
        with Image.open(tmp_path / "picture.webp") as shown:
            assert abs(shown.convert("L").getpixel((3, 3)) - brightness[round(float(start) / 0.32) * 8]) < 10
