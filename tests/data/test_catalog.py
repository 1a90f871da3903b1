"""What ingest knows of its videos: whatever the order in which results come, each video ends in one place."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_ingest_tasks import settings
from vmoco.data.catalog import Catalog
from vmoco.data.found import Found
from vmoco.data.ingest_plan import Probed
from vmoco.data.ingest_tasks import MadeShard
from vmoco.data.ledger import NOT_SEEKABLE, Loss, Rejection
from vmoco.data.shard import ShardFile
from vmoco.data.shots import End, Stretch

FIRST = ("s1", "s2", "s3")


def row(video: str, clip: str, shard: str) -> dict[str, Any]:
    """A row of the manifest."""
    texts = {"clip_id": clip, "video_id": video, "shard": shard, "sha256": "0", "entry": "", "video_sha256": video}
    sizes = dict.fromkeys(("height", "width", "offset", "num_bytes", "row", "video_bytes"), 1)
    return texts | sizes | {"start_seconds": 0.0, "fps": 25.0, "held_out": False}


def made(
    name: str,
    *rows: dict[str, Any],
    rejected: tuple[Rejection, ...] = (),
    losses: tuple[Loss, ...] = (),
    stretches: tuple[Stretch, ...] = (),
) -> MadeShard:
    """A shard, as a task gives it back."""
    file = ShardFile(1, "0", by_clips=True)
    return MadeShard(name, file, list(rows), rejected, reused=False, losses=losses, stretches=stretches)


def rejection(video: str, reason: str, shard: str) -> Rejection:
    return Rejection(video, "decode", reason, f"why in {shard}", shard=shard)


def loss(video: str, shard: str) -> Loss:
    return Loss(video, ((0.0, 1.0),), 5.0, "damage", shard=shard)


def catalog(folder: Path, *names: str) -> Catalog:
    """A catalog of videos that were probed, each with a content of its own."""
    found = Catalog(settings(folder), None)
    found.take_listing((Found(name, 9) for name in names), [])
    for each in reversed(list(found.new_videos())):
        found.add_probed(Probed(each, f"hash of {each.video_id}", 2, (), 1.0))
    found.reject_duplicates()
    return found


def ends(found: Catalog) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Clips, rejections and losses, as they will be written."""
    found.settle(without_clips="all cross a cut")
    clips = [(each["video_id"], each["clip_id"]) for piece in found.clips.batches() for each in piece.to_pylist()]
    rejected = [(each.video_id, each.reason, each.message) for each in found.rejections()]
    return clips, rejected, [(each.video_id, each.shard) for each in found.losses()]


@pytest.mark.parametrize("order", list(itertools.permutations(FIRST)))
def test_a_damaged_part_rejects_its_video(tmp_path: Path, order: tuple[str, ...]) -> None:
    """A long video in three shards: its clips go, its one row is that of the first shard, whatever came first."""
    shards = {
        "s1": made("s1", row("a", "01", "s1"), row("long", "02", "s1"), losses=(loss("long", "s1"), loss("a", "s1"))),
        "s2": made("s2", rejected=(rejection("long", "truncated", "s2"),)),
        "s3": made("s3", row("z", "03", "s3"), rejected=(rejection("long", "decode-error", "s3"),)),
    }
    found = catalog(tmp_path, "a", "cut", "long", "z")
    for name in order:
        found.add_shard(shards[name])
    assert found.forget_unseekable() == 0
    assert ends(found) == (
        [("a", "01"), ("z", "03")],
        [("cut", "cuts", "all cross a cut"), ("long", "truncated", "why in s2")],
        [("a", "s1")],
    )
    assert sorted(found.files) == list(FIRST)
    assert found.reasons() == {"cuts": 1, "truncated": 1}


@pytest.mark.parametrize("order", list(itertools.permutations(FIRST[:2])))
def test_a_video_that_cannot_be_sought_in_is_cut_again(tmp_path: Path, order: tuple[str, ...]) -> None:
    """What its parts gave is forgotten, clips, loss and rejection; what the whole video gives counts once."""
    shards = {
        "s1": made("s1", row("a", "01", "s1"), row("long", "02", "s1"), losses=(loss("long", "s1"),)),
        "s2": made("s2", rejected=(rejection("long", NOT_SEEKABLE, "s2"),)),
    }
    found = catalog(tmp_path, "a", "long")
    for name in order:
        found.add_shard(shards[name])
    assert found.forget_unseekable() == 1
    (again,) = found.unseekable()
    assert (again.found.video_id, again.notes) == ("long", ("decoded-whole: why in s2",))
    found.add_shard(made("s3", row("long", "02", "s3"), row("long", "04", "s3"), losses=(loss("long", "s3"),)))
    assert ends(found) == ([("a", "01"), ("long", "02"), ("long", "04")], [], [("long", "s3")])
    assert found.num_losses == 1


@pytest.mark.parametrize("order", list(itertools.permutations(FIRST)))
@pytest.mark.parametrize("again", [False, True])
def test_shots_count_on_in_the_order_of_parts(tmp_path: Path, order: tuple[str, ...], again: bool) -> None:
    """Whatever came first; other videos of these shards keep their numbers, and so does one that is cut again whole."""
    grey = End.of(np.zeros((2, 3), np.float32), (0.0, 0.0))
    shards = {}
    for part, name in enumerate(FIRST):
        rows = [row("long", f"{name}{shot}", name) | {"shot": shot} for shot in (0, 1)]
        own = Stretch("long", part, 1, known_before=part == 2, known_after=False, first=grey, last=grey)
        shards[name] = made(name, *rows, row(name, f"{part}", name) | {"shot": 5}, stretches=(own,))
    if again:
        shards["s2"] = dataclasses.replace(shards["s2"], rejected=(rejection("long", NOT_SEEKABLE, "s2"),))
    found = catalog(tmp_path, "long", *FIRST)
    for name in order:
        found.add_shard(shards[name])
    assert found.forget_unseekable() == again
    if again:
        found.add_shard(made("s1", *(row("long", f"w{shot}", "s1") | {"shot": shot} for shot in range(3))))
    found.settle(without_clips="")
    shots = {each["clip_id"]: each["shot"] for piece in found.clips.batches() for each in piece.to_pylist()}
    whole = {"w0": 0, "w1": 1, "w2": 2}
    parts = {"s10": 0, "s11": 1, "s20": 1, "s21": 2, "s30": 3, "s31": 4}
    assert shots == (whole if again else parts) | {"0": 5, "1": 5, "2": 5}


def test_equal_files_are_one_video(tmp_path: Path) -> None:
    """The first by name stays, also if it was probed last; another range of the file is another video."""
    found = Catalog(settings(tmp_path), None)
    spans = {"a": None, "b": None, "c": 1.0, "d": 1.0}
    found.take_listing([Found(name, 9, start_seconds=start) for name, start in spans.items()], [])
    for each in reversed(list(found.new_videos())):
        found.add_probed(Probed(each, "one file", 2, (), 1.0))
    found.reject_duplicates()
    assert [each.found.video_id for each in found.good()] == ["a", "c"]
    assert [(each.video_id, each.message) for each in found.rejections()] == [
        ("b", "the same content as a"),
        ("d", "the same content as c"),
    ]
