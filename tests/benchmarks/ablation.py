"""What each part of VideoMoCo is worth where only motion tells the class: `python -m tests.benchmarks.ablation`.

Needs `.venv/bin/pip install -e '.[benchmarks]'`. Trains every arm for the same number of steps on clips of Freedoom's
maps 1 to 16 (`tests/benchmarks/doom.py`), with the library's own loader, step and loop in fp32, from the same weights
and in the same order of clips for each seed; then a linear probe and kNN on frozen features: training part maps 17
to 24, test part maps 25 to 32. "Supervised" learns the classes of the pretraining clips instead: what this network
can reach in so many steps.

Each run is a process of one thread whose result is kept in the folder the moment it is done; started again, the
benchmark goes on with the runs that are missing. It ends by writing `results/ablation.{json,png}` beside this file and
the table into README.md, and with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.ablation_report import write_report
from tests.dataset import write_data_set
from tests.train.test_loop import Notes
from tests.train.test_step import CPU, changed
from vmoco import storage
from vmoco.config import (
    AugmentSettings,
    DataSettings,
    GeneratorSettings,
    MocoSettings,
    ModelSettings,
    PretrainSettings,
    TrainSettings,
)
from vmoco.data.augment import augment
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.evaluate.features import clip_features
from vmoco.evaluate.knn import classify
from vmoco.evaluate.probe import fit_probe
from vmoco.model.backbone import Backbone
from vmoco.seed import hash64
from vmoco.train.loop import train
from vmoco.train.optimizer import build_optimizer, learning_rate
from vmoco.train.state import TrainState

PRETRAIN_MAPS, FIT_MAPS, TEST_MAPS = range(1, 17), range(17, 25), range(25, 33)
PLACES_PER_MAP, PROBE_PLACES_PER_MAP = 72, 60
DOOM_SEED = 0

BASE = PretrainSettings(
    data=DataSettings(num_frames=16),
    # No flip: it exchanges left and right. Grey, and half of the clips blurred: colour and grain tell rooms apart.
    augment=AugmentSettings(
        size=32, min_area=0.3, grey_probability=1, blur_probability=0.5, flip_probability=0, standardise=True
    ),
    model=ModelSettings(backbone="r3d_nano", head="mlp"),
    generator=GeneratorSettings(
        drop_ratio=0.0, learning_rate=0.002, start_percent=30.0, before_start="random", frame_size=16
    ),
    moco=MocoSettings(queue_size=2048, momentum=0.99, temperature=0.1, decay=1.0),
    train=TrainSettings(
        steps=240,
        global_batch=48,
        micro_batch=24,
        optimizer="adamw",
        learning_rate=0.002,
        schedule="cosine",
        warmup_steps=20,
        log_every=40,
        checkpoint_every=240,
    ),
)
# On the exponential and in keys, as `recommended`: the oldest of 2048 keys weighs 0.5.
DECAY: dict[str, object] = {"decay": 0.99966, "age_unit": "key", "decay_on": "exp"}
RANDOM: dict[str, object] = {"drop_ratio": 0.25, "start_percent": 100.0}
ADVERSARIAL: dict[str, object] = {"drop_ratio": 0.25}
RELATIVE: dict[str, object] = {"drop_ratio": 0.25, "relative": True}

ARMS: dict[str, PretrainSettings] = {
    "random initialisation": BASE,
    "MoCo": BASE,
    "MoCo + random dropping": changed(BASE, generator=RANDOM),
    "MoCo + adversarial dropping": changed(BASE, generator=ADVERSARIAL),
    "MoCo + adversarial dropping, relative": changed(BASE, generator=RELATIVE),
    "MoCo + decay": changed(BASE, moco=DECAY),
    "VideoMoCo (both)": changed(BASE, generator=ADVERSARIAL, moco=DECAY),
    "supervised": BASE,
}


def make_data(folder: Path) -> None:
    """Renders what is not there yet: `pretrain` and `probe`, whose test part is held out."""
    try:
        from tests.benchmarks.doom import render
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: .venv/bin/pip install -e '.[benchmarks]'") from None
    if not (folder / "pretrain" / "manifest.parquet").exists():
        print("rendering the clips for pretraining", flush=True)
        write_data_set(folder / "pretrain", render(maps=PRETRAIN_MAPS, places_per_map=PLACES_PER_MAP, seed=DOOM_SEED))
    if not (folder / "probe" / "manifest.parquet").exists():
        print("rendering the clips of the probe", flush=True)
        fit = render(maps=FIT_MAPS, places_per_map=PROBE_PLACES_PER_MAP, seed=DOOM_SEED)
        test = render(maps=TEST_MAPS, places_per_map=PROBE_PLACES_PER_MAP, seed=DOOM_SEED, held_out=True)
        write_data_set(folder / "probe", fit + test)


def run_arm(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one arm and probes it."""
    torch.set_num_threads(1)
    settings = changed(ARMS[arm], run={"seed": seed})
    manifest = Manifest.load(str(folder / "pretrain"))
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    backbone, host, started = state.moco.query.backbone, Notes(), time.process_time()
    if arm == "supervised":
        train_supervised(backbone, settings, manifest)
    elif arm != "random initialisation":
        host.show = lambda line: print(f"{arm}, seed {seed}: {line}", flush=True)  # type: ignore[method-assign]
        assert train(settings, manifest, state, device=CPU, host=host)
    result = {"arm": arm, "seed": seed, "cpu_seconds": round(time.process_time() - started)}
    documents = [json.loads(text) for name, text in sorted(host.documents.items()) if name.endswith(".json")]
    return (
        result
        | probe(backbone, settings, Manifest.load(str(folder / "probe")))
        | {"metrics": host.points.get(settings.train.steps, {}), "dropped": documents[-1] if documents else {}}
    )


def train_supervised(backbone: Backbone, settings: PretrainSettings, manifest: Manifest) -> None:
    """Learns the classes of the pretraining clips: their batches, augmentation, optimizer and number of steps."""
    names = sorted(set(manifest.table["label"].to_pylist()))
    clip_ids, labels = manifest.table["clip_id"].to_pylist(), manifest.table["label"].to_pylist()
    class_of = {clip: names.index(label) for clip, label in zip(clip_ids, labels, strict=True)}
    torch.manual_seed(hash64("classifier", settings.run.seed) % 2**63)
    classifier = nn.Linear(backbone.feature_dim, len(names))
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = build_optimizer(parameters, settings.train, device=CPU)
    for batch in Loader(manifest, settings, rank=0, world_size=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(batch.step, settings.train.learning_rate, settings.train)
        clips = augment(batch.query.frames, batch.query.draws, size=settings.augment.size, by_clip=True)
        targets = torch.tensor([class_of[clip] for clip in batch.clip_ids])
        optimizer.zero_grad()
        F.cross_entropy(classifier(backbone(clips)), targets).backward()
        optimizer.step()


def probe(backbone: Backbone, settings: PretrainSettings, manifest: Manifest) -> dict[str, float]:
    """Accuracy on the test maps of a linear probe and of kNN, in percent."""
    preprocessing = Preprocessing(
        num_frames=settings.data.num_frames,
        fps=float(manifest.table["fps"][0].as_py()),
        size=settings.augment.size,
        standardise=settings.augment.standardise,
    )
    encoder = Encoder(backbone, preprocessing, {}).eval()
    rows = manifest.table
    names, labels = np.unique(rows["label"].to_pylist(), return_inverse=True)
    test = rows["held_out"].to_numpy()
    features = clip_features(encoder, manifest, rows, batch_size=48, colour=False)  # as it was trained
    videos = np.asarray(rows["video_id"].to_pylist(), dtype=object)
    linear = fit_probe(features[~test], labels[~test], video_ids=list(videos[~test]))
    apart = features - features[~test].mean(axis=0)
    apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)
    votes = classify(apart[test], [apart[~test]], labels[~test], k=20)
    assert votes.shape[1] == len(names)
    return {
        "linear": round(100 * float((linear.predict(features[test]) == labels[test]).mean()), 2),
        "knn": round(100 * float((votes.argmax(axis=1) == labels[test]).mean()), 2),
    }


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """A run's result; its name changes with its settings, so an old result never stands for a new run."""
    settings = changed(ARMS[arm], run={"seed": seed})
    return folder / "results" / f"{arm.replace(' ', '-')}-seed{seed}-{settings.content_hash()}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(storage.home()) / "ablation", help="data and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--report", action="store_true", help="only write the table of the runs that are done")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="one run alone, in this process")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    make_data(folder)
    (folder / "results").mkdir(exist_ok=True)
    if arguments.one:
        arm, seed = arguments.one[0], int(arguments.one[1])
        path = result_path(folder, arm, seed)
        storage.write_atomic(str(path), json.dumps(run_arm(arm, seed, folder), indent=1).encode())
        return
    runs = [(arm, seed) for seed in arguments.seeds for arm in ARMS]
    missing = [run for run in runs if not result_path(folder, *run).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done, results in {folder / 'results'}", flush=True)

    def start(run: tuple[str, int]) -> None:
        arm, seed = run
        command = [sys.executable, "-m", "tests.benchmarks.ablation", "--folder", str(folder), "--one", arm, str(seed)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    if not arguments.report:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(start, missing))
    done = [run for run in runs if result_path(folder, *run).exists()]
    results = [json.loads(result_path(folder, *run).read_text()) for run in done]
    print(json.dumps(write_report(results, settings=BASE)))


if __name__ == "__main__":
    main()
