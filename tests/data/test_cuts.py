"""Cuts between shots are found while a video is decoded, and with `--at-cuts split` no clip crosses one."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import videos
from tests.data.test_clip_scores import film, ingested
from tests.data.test_damage import spoil
from tests.data.test_pictures import SIZE, folder_of, write_pictures
from vmoco.data import pictures, video
from vmoco.data.clips import ClipPlan, start_indices
from vmoco.data.cuts import Watcher, cuts
from vmoco.data.decoder import Decoder, StoredClips
from vmoco.data.ledger import VideoError
from vmoco.data.parts import Part, plan_parts
from vmoco.data.probing import probe
from vmoco.data.timeline import Timeline, plan_clips, with_cuts

FILMS = ("carphone_pristine.mp4", "bigbuckbunny.mp4")
SHOTS = (9, 40, 25, 30, 46)
"""Frames of the shots of `scenes`."""
CUTS = tuple(itertools.accumulate(SHOTS))[:-1]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def scenes(*, counts: tuple[int, ...] = SHOTS) -> list[videos.Image]:
    """Shots of so many frames: each a texture that moves, dark and light in turn."""
    random = np.random.default_rng(0)
    frames = []
    for number, count in enumerate(counts):
        coarse = random.integers(0, 110, (9, 12, 3)) + 130 * (number % 2)
        texture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
        frames += [np.roll(texture, at // 4, axis=1) for at in range(count)]
    return frames


def between(counts: tuple[int, ...], num_frames: int, *, stride: int = 1) -> list[int]:
    """First frames of the clips, where each shot is planned as a video of its own."""
    firsts = [0, *itertools.accumulate(counts)]
    return [
        first + start
        for first, count in zip(firsts, counts, strict=False)
        for start in start_indices(count, num_frames=num_frames, stride=stride, max_clips=1000)
    ]


def split(path: Path, *, cut: Any = video.cut_clips, **plan: Any) -> tuple[list[int], video.Cut, list[videos.Image]]:
    """First frames, and clips, of a video with 25 frames per second."""
    sink, line = videos.Kept(), probe(str(path))
    chosen = ClipPlan(**{"num_frames": 8, "split_at_cuts": True, **plan})
    made = cut(str(path), chosen, height=72, width=96, sink=sink)
    begin = float(line.times[0] * line.time_base)
    return [round(25 * (at - begin)) for at in made.start_seconds], made, sink.clips


def planned_parts(path: Path, *, seconds: float = 600, **plan: Any) -> list[Part]:
    """The parts of a video; none where it is decoded from its start."""
    line, chosen = probe(str(path)), ClipPlan(**{"num_frames": 8, "split_at_cuts": True, **plan})
    return plan_parts(line, chosen, indices=plan_clips(line, chosen), seconds=seconds)


def test_changes_are_those_of_plain_numpy() -> None:
    """The watcher compares each frame with the one before, and none across an interruption."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    grey = frames.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    small = grey.reshape(6, 12, 4, 16, 4).mean(axis=(2, 4))
    expected = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2))
    watcher = Watcher()
    for number, frame in enumerate(frames):
        if number == 3:
            watcher.interrupt()
        watcher.see(10 * number, frame)
    found = watcher.changes(range(0, 60, 10))
    assert found[1:3] + found[4:] == pytest.approx([*expected[:2], *expected[3:]], abs=0.5)
    assert (found[0], found[3]) == (0, 0)
    assert watcher.changes([-1, 7]) == [0, 0]
    assert watcher.names == list(range(0, 60, 10))


def test_only_the_range_that_is_asked_for_has_cuts() -> None:
    """Frames outside it neither make a cut nor hide one; a clip lies between the borders, whatever its stride."""
    changes = [0.0] * 40
    changes[10] = changes[20] = changes[22] = 50.0
    line = Timeline(np.arange(40, dtype=np.int64), np.empty(0, np.int64), Fraction(1, 25), 25.0)
    plan = ClipPlan(4)
    assert cuts(changes[1:]) == [10]  # two changes so near are a flash
    assert with_cuts(line, plan, changes).cuts == (10,)
    assert with_cuts(line, ClipPlan(4, start_seconds=0.4), changes).cuts == ()
    ranged = ClipPlan(4, stride=2, end_seconds=21 / 25)
    assert with_cuts(line, ranged, changes).cuts == (10, 20)
    clips = plan_clips(with_cuts(line, ranged, changes), ranged)
    assert clips.tolist() == [[1, 3, 5, 7], [11, 13, 15, 17]]


def test_clips_of_joined_films_lie_in_their_shots(footage: Path, tmp_path: Path, decoder: Decoder) -> None:
    """Each shot gives the clips that a film of its own would give, of too many those spread evenly; none has a cut.

    A shard that is there already gives the same rows as the one that was made.
    """
    films = [film(footage, name) for name in FILMS]
    path = videos.write_video(tmp_path / "joined.mp4", [*films[0], *films[1], *films[0]], options={"crf": "23"})
    _, (made, again) = ingested(path, decoder=decoder, num_frames=16, at_cuts="split")
    assert again.reused
    assert again.rows == made.rows
    expected = between((40, 40, 40), 16)
    assert [round(25 * row["start_seconds"]) for row in made.rows] == expected == [2, 22, 42, 62, 82, 102]
    assert [(row["cuts"], row["shot"]) for row in made.rows] == [(0, at // 40) for at in expected]
    assert {row["notes"] for row in made.rows} == {"cuts: 3 shots, and no clip holds frames of two"}
    _, (dropped, _) = ingested(path, decoder=decoder, num_frames=16, at_cuts="drop")
    assert len(dropped.rows) < len(made.rows)
    _, (few, _) = ingested(path, decoder=decoder, num_frames=16, at_cuts="split", max_clips_per_video=2)
    assert [row["sha256"] for row in few.rows] == [made.rows[at]["sha256"] for at in (1, 4)]


def test_a_film_without_cuts_gives_the_bytes_of_keep(footage: Path, tmp_path: Path, decoder: Decoder) -> None:
    """The rows are equal, apart from the shard's name and the length of its header; as JPEG and at a rate too."""
    path = videos.write_video(tmp_path / "film.mp4", film(footage, FILMS[0]), options={"crf": "23"})
    for fields in ({"num_frames": 8}, {"num_frames": 16, "encoding": "jpeg", "fps": 12.5}):
        kept, rows = (ingested(path, decoder=decoder, at_cuts=how, **fields)[1][0].rows for how in ("keep", "split"))
        header = {"shard": "", "offset": 0}
        assert [row | header for row in rows] == [row | header for row in kept]
        assert rows


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_clips_do_not_depend_on_how_a_video_is_decoded(tmp_path: Path, decoder: Decoder, name: str) -> None:
    """Few clips of a long video, and a range of it, are those of a complete decoding; short parts change nothing.

    Of a range only its run is decoded, where the format allows that.
    """
    path = videos.write_video(tmp_path / name, scenes(), options={"g": "10", "bf": "2", "sc_threshold": "0"})
    kept, ranges = split(path, split_at_cuts=False, max_clips=2), []
    for plan in ({}, {"max_clips": 2}, {"stride": 3}, {"start_seconds": 1.1, "end_seconds": 4.0, "max_clips": 3}):
        starts, made, clips = split(path, **plan)
        whole, by_whole, expected = split(path, cut=video.cut_whole, **plan)
        assert starts == whole
        assert (made, len(clips)) == (by_whole, len(starts))
        np.testing.assert_array_equal(np.stack(clips), np.stack(expected))
        ranges.append(bool(planned_parts(path, **plan)))
    assert ranges == [False, False, False, name != "a.ts"]
    assert split(path)[0] == between(SHOTS, 8)
    assert split(path, stride=3)[0] == between(SHOTS, 8, stride=3)
    assert split(path, max_clips=2)[0] != kept[0]
    _, (one, _) = ingested(path, decoder=decoder, num_frames=8, at_cuts="split")
    _, (parts, _) = ingested(path, decoder=decoder, num_frames=8, at_cuts="split", part_seconds=1)
    assert (parts.name, parts.rows) == (one.name, one.rows)


def test_a_range_is_decoded_alone(tmp_path: Path, decoder: Decoder) -> None:
    """Through the decoder process: the clips of a complete decoding; shots that are too short are an error."""
    path = videos.write_video(tmp_path / "a.mp4", scenes(), options={"g": "10", "sc_threshold": "0"})
    plan = ClipPlan(8, split_at_cuts=True, start_seconds=1.1, end_seconds=4.0)
    out: Any = {"size": (72, 96), "encoding": "raw", "quality": 92, "offset": 0, "seconds": 60}

    def made(plan: ClipPlan, *, whole: bool) -> tuple[StoredClips, bytes]:
        (part,) = decoder.probe(str(path), plan, part_seconds=600, seconds=60).parts
        stored = decoder.cut(str(path), plan, extent="whole" if whole else part, **out)
        return stored, os.pread(decoder.scratch.fileno(), sum(stored.sizes), 0)

    assert made(plan, whole=False) == made(plan, whole=True)
    assert len(made(plan, whole=False)[0].sizes) >= 5
    for whole in (False, True):
        with pytest.raises(VideoError, match=r"^clip: cuts: each of its 3 shots in the range that was asked for is"):
            made(dataclasses.replace(plan, num_frames=31), whole=whole)


def test_only_videos_with_cuts_are_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video of one shot is decoded once, and so is each one whose cuts already lie between the planned clips."""
    rounds, honest = [], video._decode
    monkeypatch.setattr(video, "_decode", lambda *given: rounds.append(given) or honest(*given))
    for counts, expected in (((40,), 1), ((40, 40), 1), ((9, 40), 2)):
        rounds.clear()
        path = videos.write_video(tmp_path / "a.mp4", scenes(counts=counts))
        split(path, num_frames=20)
        assert len(rounds) == expected, counts


def test_shots_that_are_all_too_short_are_in_the_ledger(tmp_path: Path, decoder: Decoder) -> None:
    """The message says how many shots there are; a short video that is looped repeats its longest shot."""
    path = videos.write_video(tmp_path / "short.mp4", scenes(counts=(12, 14, 12)))
    _, (made, again) = ingested(path, decoder=decoder, num_frames=16, at_cuts="split")
    for each in (made, again):
        (row,) = each.rejected
        assert (row.stage, row.reason, each.rows) == ("clip", "cuts", [])
        assert row.message.startswith("each of its 3 shots is shorter than a clip, which spans 16 frames: ")
    starts, _, (clip,) = split(path, num_frames=16, short="loop")
    assert starts == [12]
    np.testing.assert_array_equal(clip[14:], clip[:2])


def test_a_clip_that_still_crosses_a_cut_is_left_out(tmp_path: Path, decoder: Decoder) -> None:
    """A dissolve of four frames is no cut from frame to frame, but from one stored frame to the next."""
    dark, _, light = (scenes(counts=(1, 1, 1))[at].astype(float) for at in range(3))
    light = 255 - light
    mixed = [dark + (light - dark) * share for share in (0.2, 0.4, 0.6, 0.8)]
    frames = [*[dark] * 38, *mixed, *[light] * 42]
    path = videos.write_video(tmp_path / "a.mp4", [frame.astype(np.uint8) for frame in frames])
    _, (made, _) = ingested(path, decoder=decoder, num_frames=4, stride=6, at_cuts="split")
    assert {row["notes"] for row in made.rows} == {"cuts: 1 of 4 clips cross a cut and are left out"}
    assert [row["cuts"] for row in made.rows] == [0, 0, 0]


def test_damaged_videos_are_split_too(tmp_path: Path) -> None:
    """No clip has damage or a cut, and each lies where it lies without the damage.

    Cuts are borders between clips, and so is the damage: a cut may lie there.
    """
    frames = scenes()
    noise = np.random.default_rng(0).integers(-12, 12, (len(frames), *frames[0].shape))
    noisy = [(frame + each).clip(0, 255).astype(np.uint8) for frame, each in zip(frames, noise, strict=True)]
    path = videos.write_video(tmp_path / "a.mkv", noisy, options={"g": "12", "x264-params": "mbtree=0"})
    _, whole, clips = split(path)
    original = dict(zip(whole.start_times, clips, strict=True))
    spoil(path, 60)
    starts, made, kept = split(path)
    assert made.damage is not None
    assert f"cuts: {len(SHOTS)} shots, and no clip holds frames of two" in made.notes
    assert len(original) - 4 <= len(starts) < len(original)
    borders = {sum(start < cut for start in starts) for cut in (*CUTS, 60)}
    assert set(made.new_shots) == borders
    assert len(borders) == len(CUTS) + 1
    for time, clip in zip(made.start_times, kept, strict=True):
        np.testing.assert_array_equal(clip, original[time])


def test_folders_of_pictures_are_split_too(tmp_path: Path) -> None:
    """The clips are those of a video; a damaged picture costs its clip; shots that are too short are an error."""
    folder = write_pictures(tmp_path / "a", scenes())
    plan, kept = ClipPlan(8, split_at_cuts=True), videos.Kept()
    damaged: tuple[int, ...] = ()

    def starts(plan: ClipPlan) -> list[int]:
        made = pictures.cut(folder_of(folder), plan, part=None, sink=kept, **SIZE)
        borders = {sum(start < cut for start in made.start_times) for cut in (*CUTS, *damaged)}
        assert set(made.new_shots) == borders
        assert f"cuts: {len(SHOTS)} shots, and no clip holds frames of two" in made.notes
        return made.start_times

    assert starts(plan) == between(SHOTS, 8)
    with pytest.raises(VideoError, match=r"^clip: cuts: each of its 5 shots is shorter than a clip, which spans 50"):
        starts(ClipPlan(50, split_at_cuts=True))
    (folder / "frame_000061.png").write_bytes(b"no picture")
    damaged = (60,)
    assert starts(plan) == [start for start in between(SHOTS, 8) if not start <= 60 < start + 8]
