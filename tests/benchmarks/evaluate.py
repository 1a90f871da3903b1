"""Do kNN and probe agree with scikit-learn on the same features? `python -m tests.benchmarks.evaluate`.

The features have as many classes and clips as a split of HMDB51, one clip of each video, in parts as an evaluation
reads them. scikit-learn's kNN uses the same weights for its votes, by brute force. Its logistic regression is fitted
from scratch until it converges, with the strength that the probe chose. Agreement is the share of test clips on which
both are right or both are wrong. Ends with one JSON line: agreements, accuracies, seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from tests.embeddings import table_of
from vmoco.evaluate.protocols import find_splits, measure_knn, measure_probe
from vmoco.job_settings import EvaluateSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--classes", type=int, default=51)
    parser.add_argument("--width", type=int, default=128)
    wanted = parser.parse_args()
    random = np.random.default_rng(0)
    classes = random.integers(0, wanted.classes, wanted.clips)
    features = random.normal(size=(wanted.clips, wanted.width))
    features += 0.35 * random.normal(size=(wanted.classes, wanted.width))[classes]
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    report: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        table = table_of(Path(folder), features, [f"{name:03d}" for name in classes], block=128)
        (split,) = find_splits(table.rows, protocol="knn")
        settings = EvaluateSettings(data="-")
        train, test = features[split.train], features[split.test]
        truth, labels = split.labels[split.test], split.labels[split.train]

        started = time.perf_counter()
        (knn,) = measure_knn(table, split, settings)
        report["knn_seconds"] = time.perf_counter() - started
        model = KNeighborsClassifier(
            settings.k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / settings.temperature),
        )
        theirs = model.fit(train, labels).predict(test) == truth
        report |= {"knn_agreement": float((knn.right == theirs).mean()), "knn_accuracy": float(knn.right.mean())}

        started = time.perf_counter()
        (probe,) = measure_probe(table, split, settings)
        report["probe_seconds"] = time.perf_counter() - started
        scaled = StandardScaler().fit(train)
        strength = float(probe.detail.removeprefix("C "))
        fitted = LogisticRegression(C=strength, max_iter=5000, tol=1e-6).fit(scaled.transform(train), labels)
        theirs = fitted.predict(scaled.transform(test)) == truth
        report |= {
            "probe_agreement": float((probe.right == theirs).mean()),
            "probe_accuracy": float(probe.right.mean()),
        }
        report["probe_strength"] = strength
    print(json.dumps({name: round(value, 4) for name, value in report.items()}))


if __name__ == "__main__":
    main()
