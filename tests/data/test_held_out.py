"""Which videos are held out, and whether they are enough for a score."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.dataset import make_data_set
from vmoco.data.held_out import is_by_entry, is_held_out, scoring_problem, sources_of
from vmoco.evaluate.score import TooFewVideosError, scored_clips


def test_the_held_out_share_is_right() -> None:
    """About the given percentage is held out, and a larger percentage holds out the same videos and more."""
    names = [f"folder/{number}.mp4" for number in range(20_000)]
    ten, thirty = ({name for name in names if is_held_out(name, percent)} for percent in (10.0, 30.0))
    assert abs(len(ten) - 2000) < 5 * np.sqrt(2000)
    assert ten < thirty
    assert not any(is_held_out(name, 0.0) for name in names)


@pytest.mark.parametrize("num_held_out", [0, 1, 2, 3])
def test_what_is_refused_is_what_cannot_be_scored(tmp_path: Path, num_held_out: int) -> None:
    """The score is refused with the same message, and computed where there is none."""
    manifest = make_data_set(tmp_path, num_held_out=num_held_out)
    if problem := scoring_problem(manifest):
        assert problem.startswith(
            f"{num_held_out} of {num_held_out} held-out videos have two clips that do not overlap"
        )
        with pytest.raises(TooFewVideosError, match=re.escape(problem)):
            scored_clips(manifest)
    else:
        assert len(scored_clips(manifest)[0]["video_id"].unique()) == num_held_out
    assert bool(problem) == (num_held_out < 2)


def test_the_percentage_that_it_names_is_enough(tmp_path: Path) -> None:
    """With it the score can be computed, and with 5 less it cannot."""
    manifest = make_data_set(tmp_path)
    found = re.search(
        r"another --output with --held-out-percent (\d+), which holds out (\d+) such", scoring_problem(manifest)
    )
    assert found is not None
    names = manifest.table["video_id"].to_pylist()
    for percent, enough in ((int(found[1]), True), (int(found[1]) - 5, False)):
        held_out = pa.array([is_held_out(name, percent) for name in names])
        table = manifest.table.set_column(manifest.table.column_names.index("held_out"), "held_out", held_out)
        assert (scoring_problem(manifest.with_table(table)) == "") is enough
        if enough:
            assert len(table.filter(held_out)["video_id"].unique()) == int(found[2])


@pytest.mark.parametrize(("num_videos", "clips_per_video"), [(12, 1), (2, 2)])
def test_where_no_percentage_is_enough_more_videos_or_clips_are(
    tmp_path: Path, num_videos: int, clips_per_video: int
) -> None:
    """Of videos with a single clip, and where no video would be left for training."""
    problem = scoring_problem(make_data_set(tmp_path, num_videos=num_videos, clips_per_video=clips_per_video))
    assert problem.endswith(
        "ingest more videos, or cut more clips of each (--max-clips-per-video), into another --output"
    )


def rows(*entries: tuple[str, str | None, str, str | None]) -> pa.Table:
    columns = zip(*entries, strict=True)
    return pa.table(
        {
            name: pa.array(column, pa.string())
            for name, column in zip(("video_id", "range", "video_sha256", "source"), columns, strict=True)
        }
    )


def test_sources_of_old_and_new_data_sets() -> None:
    """Recorded ones; without a record, entries of one file are one source, whatever their names."""
    old = rows(("a.mp4#0-2", "0-2", "1", None), ("second", "2-4", "1", None), ("b.mp4", None, "2", None))
    assert sources_of(old) == ["a.mp4", "a.mp4", "b.mp4"]
    new = rows(("x", "0-2", "1", "camera 1"), ("y", None, "2", "camera 1"), ("a.mp4#2-4", "2-4", "3", "a.mp4"))
    assert sources_of(new) == ["camera 1", "camera 1", "a.mp4"]
    appended = rows(("a.mp4", None, "1", None), ("a.mp4#2-4", "2-4", "1", "a.mp4"))
    assert sources_of(appended) == ["a.mp4", "a.mp4"]
    parts = rows(("a.mp4#0-3", "0-3", "1", "a.mp4#0-3"), ("a.mp4#3-6", "3-6", "1", "a.mp4#3-6"))
    assert sources_of(parts) == ["a.mp4#0-3", "a.mp4#3-6"]


@pytest.mark.parametrize(
    ("entry", "by_entry"),
    [
        (("a.mp4#0-2", "0-2", "1", None), True),
        (("0347ZoDXyP0_000095_000105", None, "1", None), True),
        (("a.mp4", None, "1", None), False),
        (("a.mp4#0-2", "0-2", "1", "a.mp4"), False),
        (("0347ZoDXyP0_000095_000105", None, "1", "0347ZoDXyP0"), False),
    ],
)
def test_data_sets_of_earlier_versions_are_known(
    entry: tuple[str, str | None, str, str | None], by_entry: bool
) -> None:
    """By an entry that is no complete file and has no source."""
    assert is_by_entry(rows(("z.mp4", None, "0", None), entry)) is by_entry


def test_videos_of_one_source_are_no_videos_to_tell_apart(tmp_path: Path) -> None:
    """Three held-out ranges of one file are refused: every answer would be right."""
    manifest = make_data_set(tmp_path, num_held_out=3)
    names = manifest.table.column_names
    source = pa.array(["film.mp4" if held else None for held in manifest.table["held_out"].to_pylist()], pa.string())
    shared = manifest.with_table(manifest.table.set_column(names.index("source"), "source", source))
    assert scoring_problem(manifest) == ""
    problem = scoring_problem(shared)
    assert problem.startswith(
        "1 of 1 held-out sources have two clips that do not overlap in time, and the label-free score"
    )
    with pytest.raises(TooFewVideosError, match=re.escape(problem)):
        scored_clips(shared)
