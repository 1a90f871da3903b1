"""The protocols on a table in parts give scikit-learn's answers on the same features, video by video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from tests.embeddings import table_of
from vmoco.evaluate.protocols import Split, find_splits, measure_knn, measure_probe, measure_retrieval, video_right
from vmoco.evaluate.table import FeatureTable
from vmoco.job_settings import EvaluateSettings

SETTINGS = EvaluateSettings(data="none", k=9)


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[FeatureTable, Split, np.ndarray]:
    """160 clips of 4 classes, each of a video of its own; some are hard."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 4, 160)
    features = random.normal(size=(160, 12)) + random.normal(size=(4, 12))[classes] * 0.9
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    table = table_of(tmp_path, features, [f"class {name}" for name in classes])
    (split,) = find_splits(table.columns(), protocol="knn")
    return table, split, features


def test_knn_is_scikit_learns(labelled: tuple[FeatureTable, Split, np.ndarray]) -> None:
    """It is right and wrong on the same videos as scikit-learn's."""
    table, split, features = labelled
    (found,) = measure_knn(table, split, SETTINGS)
    model = KNeighborsClassifier(9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    model.fit(features[split.train], split.labels[split.train])
    expected = model.predict(features[split.test]) == split.labels[split.test]
    assert found.right.tolist() == expected.tolist()
    assert 0.3 < found.right.mean() < 0.99, "neither trivial nor hopeless, so the comparison says something"


def test_the_probe_is_scikit_learns(labelled: tuple[FeatureTable, Split, np.ndarray]) -> None:
    """It equals scikit-learn's at the strength that it reports."""
    table, split, features = labelled
    (found,) = measure_probe(table, split, SETTINGS)
    scaled = StandardScaler().fit(features[split.train])
    model = LogisticRegression(C=float(found.detail.removeprefix("C ")), max_iter=5000)
    model.fit(scaled.transform(features[split.train]), split.labels[split.train])
    expected = model.predict(scaled.transform(features[split.test])) == split.labels[split.test]
    assert np.mean(found.right == expected) > 0.97
    assert 0.3 < found.right.mean() < 0.99


def test_recall_is_by_the_plain_definition(labelled: tuple[FeatureTable, Split, np.ndarray]) -> None:
    """A training video of the class among the k nearest, k by k, by scikit-learn's neighbours."""
    table, split, features = labelled
    found = {each.protocol: each.right for each in measure_retrieval(table, split, SETTINGS)}
    assert list(found) == [f"retrieval-R@{k}" for k in (1, 5, 10, 20, 50)]
    neighbours = NearestNeighbors(n_neighbors=50, metric="cosine").fit(features[split.train])
    _, rows = neighbours.kneighbors(features[split.test])
    labels = split.labels[split.train][rows]
    for k in (1, 5, 10, 20, 50):
        expected = [truth in near[:k] for truth, near in zip(split.labels[split.test], labels, strict=True)]
        assert found[f"retrieval-R@{k}"].tolist() == expected


def test_a_video_is_answered_by_the_mean_of_its_clips() -> None:
    """One clip that is certain outweighs two clips that are not."""
    videos = np.array(["b", "a", "b", "b"], dtype=object)
    split = Split("s", np.zeros(4, bool), np.ones(4, bool), np.array([1, 0, 1, 1]), ("x", "y"), videos)
    shares = np.array([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [0.0, 1.0]])
    right, names = video_right([shares[:2], shares[2:]], np.arange(2), videos=videos, split=split)
    assert (right.tolist(), names.tolist()) == ([1.0, 1.0], ["a", "b"])


def test_a_large_training_part_is_thinned_evenly(labelled: tuple[FeatureTable, Split, np.ndarray]) -> None:
    """With a limit on the clips in memory, the probe still classifies every test video."""
    table, split, _ = labelled
    (found,) = measure_probe(table, split, SETTINGS.model_copy(update={"max_probe_clips": 40}))
    assert len(found.right) == split.test.sum()
    assert found.right.mean() > 0.3


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
    """Train and test follow the files; validation clips and clips without a label are in neither part."""
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
    """All other videos train."""
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
