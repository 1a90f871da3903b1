"""Labelled clips are cut as the official splits say, or by what was held out; what is missing is said."""

from __future__ import annotations

import pyarrow as pa
import pytest

from vmoco.evaluate.protocols import find_splits


def rows(labels: list[str | None], **columns: list[object]) -> pa.Table:
    count = len(labels)
    given = {"held_out": [False] * count, "split_1": [None] * count, "split_2": [None] * count} | columns
    return pa.table(
        {
            "video_id": [f"v{row}" for row in range(count)],
            "label": pa.array(labels, pa.string()),
            "split_3": pa.array([None] * count, pa.string()),
            **{
                name: pa.array(values, pa.bool_() if name == "held_out" else pa.string())
                for name, values in given.items()
            },
        }
    )


def test_official_splits_are_followed() -> None:
    """Train and test as written; validation clips, and clips without a label, are in neither."""
    table = rows(
        ["b", "a", None, "b", "a"],
        split_1=["train", "test", "train", "validate", "train"],
        split_2=["test", "train", None, None, "train"],
    )
    first, second = find_splits(table, protocol="knn")
    assert (first.name, first.classes, first.labels.tolist()) == ("split 1", ("a", "b"), [1, 0, -1, 1, 0])
    assert first.train.tolist() == [True, False, False, False, True]
    assert first.test.tolist() == [False, True, False, False, False]
    assert second.test.tolist() == [True, False, False, False, False]
    assert [split.name for split in find_splits(table, (2,), protocol="knn")] == ["split 2"]
    assert first.chance == 0.5


def test_without_official_splits_the_held_out_videos_test() -> None:
    """All the others train."""
    (split,) = find_splits(rows(["a", "b", "a"], held_out=[False, True, False]), protocol="knn")
    assert (split.name, split.train.tolist(), split.test.tolist()) == (
        "held out",
        [True, False, True],
        [False, True, False],
    )


def test_what_is_missing_is_said() -> None:
    """Labels, with the protocol that needs them; a split that is not there; a part without a clip."""
    with pytest.raises(ValueError, match=r"probe needs labels, and no clip of the data set has one.*label-free"):
        find_splits(rows([None, None]), protocol="probe")
    table = rows(["a", "b"], split_1=["train", "test"])
    with pytest.raises(ValueError, match="has no official split 3: it has 1"):
        find_splits(table, (3,), protocol="knn")
    with pytest.raises(ValueError, match="knn on held out: its test part has no labelled clip"):
        find_splits(rows(["a", "b"]), protocol="knn")
