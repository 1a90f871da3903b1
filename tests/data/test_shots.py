"""Clips have one `shot` where they are of one true shot, as far as that is known, whatever the layout of the shards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.benchmarks.curate import ingested as in_shards
from tests.data.test_clip_scores import ingested
from tests.data.test_cuts import CUTS, SHOTS, scenes
from tests.data.videos import Image, write_video
from vmoco.data import clip_scores, ingest_tasks
from vmoco.data.clip_scores import Looked, look
from vmoco.data.decoder import Decoder
from vmoco.data.distribute import from_table, to_table
from vmoco.data.ingest_tasks import MadeShard
from vmoco.data.manifest import FIELDS
from vmoco.data.shots import Stretch, first_numbers, numbers, stretch

CLOSED = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def looked_at(*clips: list[Image]) -> list[Looked]:
    """The clips, looked at."""
    return [look(np.stack(clip), "raw", np.stack(clip).shape) for clip in clips]


def five_clips() -> list[Looked]:
    """Clips of three shots: A A | B, then B with a cut to C, then C."""
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 120, (40, 48, 3), dtype=np.uint8) for _ in range(2))
    return looked_at([one] * 4, [one] * 4, [255 - one] * 4, [255 - one, *[other] * 3], [other] * 4)


def shot_of(row: dict[str, Any], cuts: tuple[int, ...]) -> int:
    """The true shot in which a clip begins, at 25 frames per second."""
    return sum(cut <= round(25 * row["start_seconds"]) for cut in cuts)


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The clips that have one `shot`, two by two."""
    return [
        (one["clip_id"], other["clip_id"])
        for one, other in itertools.combinations(sorted(rows, key=lambda row: row["start_seconds"]), 2)
        if one["shot"] == other["shot"]
    ]


def test_shots_go_on_from_clip_to_clip() -> None:
    """Another number after a cut inside a clip, between two clips that differ, and where a border is known."""
    clips = five_clips()
    assert numbers(clips, known=(), every_frame=False) == [0, 0, 1, 1, 2]
    assert numbers(clips, known={1}, every_frame=False) == [0, 1, 2, 2, 3]
    assert numbers(clips, known={1}, every_frame=True) == [0, 1, 1, 1, 2]
    assert numbers([], known={0}, every_frame=True) == []


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("known", [set(), {0}, {2}, {1, 4}, {5}])
def test_shots_count_on_from_shard_to_shard(known: set[int], early: bool) -> None:
    """Wherever the clips are divided, also into nothing: the numbers are those of all in one shard.

    Parts have any number: the numbers fit the column. Stretches keep what they say on their way through Ray and JSON.
    """
    clips = five_clips()
    whole = numbers(clips, known=known, every_frame=False)
    for places in itertools.combinations_with_replacement(range(6), 3):
        stretches, shots = [], []
        for part, (low, high) in enumerate(itertools.pairwise((0, *places, 5)), start=40_000):
            # A border at the end of one is also at the beginning of the next: one of them knows it.
            inside = range(low + (early and low > 0), high + (early or high == 5))
            own = {number - low for number in known if number in inside}
            shots.append(numbers(clips[low:high], known=own, every_frame=False))
            stretches.append(stretch("a", part, clips[low:high], shots[-1], own))
        assert from_table(to_table(stretches, Stretch), Stretch) == stretches
        found = [first + shot for first, own in zip(first_numbers(stretches), shots, strict=True) for shot in own]
        assert found == whole, places
    assert pa.array(whole, pa.schema(FIELDS).field("shot").type).to_pylist() == whole


def test_parts_in_one_shard_are_scored_as_one_video(tmp_path: Path, decoder: Decoder) -> None:
    """Long videos in parts, made and found again: the rows are those of the video that is decoded in one go."""
    path = write_video(tmp_path / "long.mp4", four_scenes(), options=CLOSED)
    _, (whole, _) = ingested(path, decoder=decoder)
    _, (parts, again) = ingested(path, decoder=decoder, part_seconds=2)
    assert whole.name != parts.name
    names = [field.name for field in clip_scores.FIELDS]
    columns = [[[row[name] for name in names] for row in made.rows] for made in (whole, parts, again)]
    assert columns[0] == columns[1] == columns[2]
    assert max(row["shot"] for row in parts.rows) == 3


@pytest.mark.parametrize("counts", [(45, 135), (45, 45, 45, 45), (135, 45)])
def test_notes_are_those_of_all_parts(tmp_path: Path, decoder: Decoder, counts: tuple[int, ...]) -> None:
    """Clips that are left out of any part of a long video are counted in each row of the video, as without parts."""
    path = write_video(tmp_path / "long.mp4", scenes(counts=counts), options=CLOSED)
    _, (whole, _) = ingested(path, decoder=decoder, num_frames=12, at_cuts="drop")
    _, (parts, again) = ingested(path, decoder=decoder, num_frames=12, at_cuts="drop", part_seconds=2)
    assert again == found_again(parts)
    note = f"cuts: {len(counts) - 1} of 15 clips cross a cut and are left out"
    assert {row["notes"] for made in (whole, parts) for row in made.rows} == {note}


def four_scenes() -> list[Image]:
    """45 frames of each."""
    random = np.random.default_rng(0)
    textures = [random.integers(0, 120, (9, 12, 3)) + 130 * (at % 2) for at in range(4)]
    return [np.kron(textures[number // 45], np.ones((8, 8, 1))).astype(np.uint8) for number in range(180)]


@pytest.mark.parametrize("at_cuts", ["keep", "drop"])
def test_shots_do_not_depend_on_the_layout(tmp_path: Path, decoder: Decoder, at_cuts: str) -> None:
    """One shard or several, long or short parts, made or found again: the columns of the manifest are the same."""
    path = write_video(tmp_path / "long.mp4", four_scenes(), options=CLOSED)
    names = ["clip_id", "sha256", *(field.name for field in clip_scores.FIELDS)]
    found, counts = [], []
    for layout in ({}, {"shard_megabytes": 1}, {"part_seconds": 2}, {"part_seconds": 1, "shard_megabytes": 1}):
        fields = {"num_frames": 8, "max_clips_per_video": 1000, "at_cuts": at_cuts, **layout}
        made = in_shards(tmp_path, [path], decoder, **fields)
        rows = sorted((row for each in made for row in each.rows), key=lambda row: row["start_seconds"])
        found.append([[row[name] for name in names] for row in rows])
        counts.append(len(made))
    assert max(counts) >= 4
    assert found[1:] == found[:1] * 3
    assert {row[-1] for row in found[0]} == {0, 1, 2, 3}


@pytest.mark.parametrize("fields", [{"stride": 4}, {"stride": 3, "num_frames": 3}, {"fps": 5.0}, {"fps": 100.0}, {}])
def test_split_keeps_the_shots_that_it_has_found(tmp_path: Path, decoder: Decoder, fields: dict[str, Any]) -> None:
    """Clips have one `shot` where no true cut lies between them, at any stride; also where the shard is there already.

    At a stride, the changes from one stored frame to the next are too large for a cut to stand out.
    """
    path = write_video(tmp_path / "a.mp4", swaying(), options={"g": "10", "sc_threshold": "0"})
    _, (made, again) = ingested(path, decoder=decoder, at_cuts="split", **{"num_frames": 4, **fields})
    assert again == found_again(made)
    expected = [
        (one["clip_id"], other["clip_id"])
        for one, other in itertools.combinations(made.rows, 2)
        if shot_of(one, CUTS) == shot_of(other, CUTS)
    ]
    assert pairs(made.rows) == expected
    assert len({shot_of(row, CUTS) for row in made.rows}) >= 4


def found_again(made: MadeShard) -> MadeShard:
    """The shard as it is when it is there already."""
    return dataclasses.replace(made, reused=True)


def swaying() -> list[Image]:
    """Scenes that move by a pixel in each frame, so that strides of some frames change much of the picture."""
    random, frames = np.random.default_rng(0), []
    for number, count in enumerate(SHOTS):
        texture = np.kron(random.integers(0, 110, (9, 12, 3)) + 60 * (number % 2), np.ones((8, 8, 1))).astype(np.uint8)
        frames += [np.roll(texture, 2 * at, axis=1) for at in range(count)]
    return frames


def test_a_clip_that_is_left_out_ends_a_shot(tmp_path: Path, decoder: Decoder) -> None:
    """A scene, another one for some frames, and the first again: the clips around are of two shots, as with keep."""
    first, other = (scenes(counts=(1, 1))[at] for at in (0, 1))
    path = write_video(tmp_path / "a.mp4", [*[first] * 19, *[other] * 3, *[first] * 26])
    found = {}
    for at_cuts in ("keep", "drop"):
        _, (made, again) = ingested(path, decoder=decoder, num_frames=8, at_cuts=at_cuts)
        assert again == found_again(made)
        found[at_cuts] = made.rows
    clean = [row for row in found["keep"] if not row["cuts"]]
    assert 0 < len(clean) < len(found["keep"])
    assert [row["clip_id"] for row in found["drop"]] == [row["clip_id"] for row in clean]
    assert pairs(found["drop"]) == pairs(clean)
    assert len({row["shot"] for row in found["drop"]}) == 2


def test_recordings_are_shots(tmp_path: Path, decoder: Decoder) -> None:
    """Two recordings of one scene that were joined: no clip of the one has the shot of a clip of the other."""
    (picture,) = scenes(counts=(1,))
    one = write_video(tmp_path / "one.ts", [picture] * 44).read_bytes()
    path = tmp_path / "in" / "a.ts"
    path.parent.mkdir()
    path.write_bytes(one + one)
    for at_cuts in ("keep", "split"):
        _, (made, again) = ingested(path, decoder=decoder, num_frames=8, at_cuts=at_cuts)
        assert again == found_again(made)
        assert [row["shot"] for row in made.rows] == [int(row["start_seconds"] >= 44 / 25) for row in made.rows]
        assert {row["shot"] for row in made.rows} == {0, 1}


def test_a_shard_that_does_not_tell_its_cuts_is_made_again(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version forgot them: an ingest that it began, and this one finishes, has the shots all the same."""
    path = write_video(tmp_path / "a.mp4", scenes(), options={"g": "10", "sc_threshold": "0"})
    with monkeypatch.context() as patch:
        patch.setattr(ingest_tasks, "_new_shots", lambda *_: {})
        _, (_, earlier) = ingested(path, decoder=decoder, num_frames=8, at_cuts="split")
    _, (made, again) = ingested(path, decoder=decoder, num_frames=8, at_cuts="split")
    assert (earlier.reused, made.reused, again.reused) == (False, False, True)
    assert [row["sha256"] for row in made.rows] == [row["sha256"] for row in earlier.rows]
