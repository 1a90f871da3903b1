"""What each part of VideoMoCo is worth where only motion tells the class: `python -m tests.benchmarks.ablation`.

Needs `.venv/bin/pip install -e '.[benchmarks]'`. Three data sets: `doom`, an action that lasts for the whole clip;
`moments`, the same maps and actions, but the action takes 4 to 8 of 16 frames and the player stands still otherwise
(`tests/benchmarks/doom.py`); `camera`, a virtual camera over frames of real footage (`tests/benchmarks/camera.py`).

The design is forked, because runs from scratch differ more by their seed than by what is compared. A *trunk* is plain
MoCo, trained for 700 steps from a seed's weights. Every arm starts from the trunk's query and key encoder, heads
included, with an empty queue, and trains for 400 steps on a learning-rate cycle of its own, with the same clips in the
same order. So arms are compared within a trunk, and the interval of a difference is over trunks. All of it is the
library's own loader, step and loop, in fp32. Then a linear probe and kNN are fitted on frozen features of other maps or
videos. Settings are chosen by the validation part; the test part is for the report. "Supervised" learns the classes of
the pretraining clips, from the seed's weights and for as many steps as a trunk and an arm have together: what this
network can reach.

Each run is a process of one thread. Its result, and the weights that it ends with, are kept in the folder the moment it
is done; started again, the benchmark goes on with the runs that are missing. It ends by writing
`results/ablation.{json,png}` beside this file and the table into vmoco/METHOD.md, and with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
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
from vmoco.data.shard import Clip
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.evaluate.features import clip_features
from vmoco.evaluate.knn import classify
from vmoco.evaluate.probe import fit_probe
from vmoco.model.backbone import Backbone
from vmoco.seed import hash64
from vmoco.train.loop import train
from vmoco.train.optimizer import build_optimizer, learning_rate
from vmoco.train.state import TrainState

# The probe is fitted on the maps of pretraining too, but at other places: labels are not used before.
PRETRAIN_MAPS, FIT_MAPS, VALIDATION_MAPS, TEST_MAPS = range(1, 17), range(1, 23), range(23, 25), range(25, 33)
PLACES_PER_MAP, FIT_PLACES_PER_MAP, TEST_PLACES_PER_MAP = 72, 60, 240
PRETRAIN_SEED, PROBE_SEED = 0, 1
CAMERA_CLIPS = {"pretrain": 1152, "fit": 1320, "validation": 480, "test": 1920}  # frames that are drawn, 2 clips each
DATA_SETS = ("doom", "moments", "camera")
PARTS = ("fit", "validation", "test")

TRUNK_STEPS, FORK_STEPS = 700, 400

BASE = PretrainSettings(
    data=DataSettings(num_frames=16),
    # No flip: it exchanges left and right. Grey, and half of the clips blurred: colour and grain tell rooms apart.
    augment=AugmentSettings(
        size=32, min_area=0.3, grey_probability=1, blur_probability=0.5, flip_probability=0, standardise=True
    ),
    model=ModelSettings(backbone="r3d_nano", head="mlp"),
    generator=GeneratorSettings(
        drop_ratio=0.0, learning_rate=0.002, start_percent=0.0, before_start="random", frame_size=16
    ),
    moco=MocoSettings(queue_size=2048, momentum=0.99, temperature=0.1, decay=1.0),
    train=TrainSettings(
        steps=FORK_STEPS,
        global_batch=48,
        micro_batch=24,
        optimizer="adamw",
        learning_rate=0.002,
        schedule="cosine",
        warmup_steps=20,
        log_every=40,
        checkpoint_every=FORK_STEPS,
    ),
)
# On the exponential and in keys, as `recommended`: the oldest of 2048 keys weighs 0.5.
DECAY: dict[str, object] = {"decay": 0.99966, "age_unit": "key", "decay_on": "exp"}
RANDOM: dict[str, object] = {"drop_ratio": 0.25, "start_percent": 100.0}
ADVERSARIAL: dict[str, object] = {"drop_ratio": 0.25}
RELATIVE: dict[str, object] = {"drop_ratio": 0.25, "relative": True}

TRUNK = "trunk: MoCo, 700 steps"
ARMS: dict[str, PretrainSettings] = {
    TRUNK: changed(BASE, train={"steps": TRUNK_STEPS, "warmup_steps": 50, "checkpoint_every": TRUNK_STEPS}),
    "MoCo": BASE,
    "MoCo + random dropping": changed(BASE, generator=RANDOM),
    "MoCo + adversarial dropping": changed(BASE, generator=ADVERSARIAL),
    "MoCo + adversarial dropping, relative": changed(BASE, generator=RELATIVE),
    "MoCo + two clips": changed(BASE, data={"positives": "two_clips"}),
    "MoCo + two clips + random dropping": changed(BASE, data={"positives": "two_clips"}, generator=RANDOM),
    "MoCo + decay": changed(BASE, moco=DECAY),
    "VideoMoCo (adversarial dropping + decay)": changed(BASE, generator=ADVERSARIAL, moco=DECAY),
    "random initialisation": BASE,
    "supervised": changed(BASE, train={"steps": TRUNK_STEPS + FORK_STEPS, "warmup_steps": 50}),
}
_FROM_SCRATCH = (TRUNK, "random initialisation", "supervised")


def make_data(folder: Path, name: str) -> None:
    """Renders what is not there yet of a data set: its clips for pretraining, and the three parts of the probe."""
    for part in ("pretrain", *PARTS):
        place = folder / name / part
        if not (place / "manifest.parquet").exists():
            print(f"rendering {name}, {part}", flush=True)
            write_data_set(place, render(name, part))


def render(name: str, part: str) -> list[Clip]:
    """The clips of a part of a data set."""
    if name == "camera":
        from tests.benchmarks import camera
        from vmoco.data import footage

        videos = {"pretrain": camera.PRETRAIN, "fit": camera.FIT, "validation": camera.FIT, "test": camera.TEST}[part]
        seed = hash64("camera part", part) % 1000
        return camera.render(footage.fetch(), videos=videos, number=CAMERA_CLIPS[part], seed=seed)
    try:
        from tests.benchmarks import doom
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: .venv/bin/pip install -e '.[benchmarks]'") from None
    maps, places, seed = {
        "pretrain": (PRETRAIN_MAPS, PLACES_PER_MAP, PRETRAIN_SEED),
        "fit": (FIT_MAPS, FIT_PLACES_PER_MAP, PROBE_SEED),
        "validation": (VALIDATION_MAPS, TEST_PLACES_PER_MAP, PROBE_SEED),
        "test": (TEST_MAPS, TEST_PLACES_PER_MAP, PROBE_SEED),
    }[part]
    return doom.render(maps=maps, places_per_map=places, seed=seed, moments=name == "moments")


def run_arm(data: str, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one arm on a data set and probes it; the weights that it ends with are kept too."""
    torch.set_num_threads(1)
    settings = settings_of(arm, seed)
    manifest = Manifest.load(str(folder / data / "pretrain"))
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    host, started = Notes(), time.process_time()
    if arm not in _FROM_SCRATCH:
        begin_from(result_path(folder, data, TRUNK, seed).with_suffix(".safetensors"), state)
    if arm == "supervised":
        train_supervised(state.moco.query.backbone, settings, manifest)
    elif arm != "random initialisation":
        host.show = lambda line: print(f"{data}, {arm}, seed {seed}: {line}", flush=True)  # type: ignore[method-assign]
        assert train(settings, manifest, state, device=CPU, host=host)
    result = {"data": data, "arm": arm, "seed": seed, "cpu_seconds": round(time.process_time() - started)}
    weights = result_path(folder, data, arm, seed).with_suffix(".safetensors")
    # Of a trunk also the key encoder: its arms start from both.
    modules = {"query": state.moco.query} | ({"key": state.moco.key} if arm == TRUNK else {})
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    storage.write_atomic(str(weights), safetensors.torch.save(tensors))
    documents = [json.loads(text) for name, text in sorted(host.documents.items()) if name.endswith(".json")]
    return (
        result
        | probe(state.moco.query.backbone, settings, folder / data)
        | {"metrics": host.points.get(settings.train.steps, {}), "dropped": documents[-1] if documents else {}}
    )


def begin_from(weights: Path, state: TrainState) -> None:
    """Gives a new state the query and key encoder of a trunk, with their heads; all else stays new."""
    tensors = safetensors.torch.load_file(weights)
    for part, module in {"query": state.moco.query, "key": state.moco.key}.items():
        module.load_state_dict({n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")})


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


def probe(backbone: Backbone, settings: PretrainSettings, folder: Path) -> dict[str, float]:
    """Accuracy of a linear probe and of kNN on the validation and the test part, in percent."""
    manifests = {part: Manifest.load(str(folder / part)) for part in PARTS}
    preprocessing = Preprocessing(
        num_frames=settings.data.num_frames,
        fps=float(manifests["fit"].table["fps"][0].as_py()),
        size=settings.augment.size,
        standardise=settings.augment.standardise,
    )
    encoder = Encoder(backbone, preprocessing, {}).eval()
    names = sorted(set(manifests["fit"].table["label"].to_pylist()))
    features, labels = {}, {}
    for part, manifest in manifests.items():
        # Without colour, as it was trained.
        features[part] = clip_features(encoder, manifest, manifest.table, batch_size=48, colour=False)
        labels[part] = np.array([names.index(label) for label in manifest.table["label"].to_pylist()])
    videos = manifests["fit"].table["video_id"].to_pylist()
    linear = fit_probe(features["fit"], labels["fit"], video_ids=videos)
    mean = features["fit"].mean(axis=0)
    apart = {part: found - mean for part, found in features.items()}
    apart = {
        part: found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9) for part, found in apart.items()
    }
    scores = {}
    for part in ("validation", "test"):
        votes = classify(apart[part], [apart["fit"]], labels["fit"], k=20)
        assert votes.shape[1] == len(names)
        scores[f"linear_{part}"] = round(100 * float((linear.predict(features[part]) == labels[part]).mean()), 2)
        scores[f"knn_{part}"] = round(100 * float((votes.argmax(axis=1) == labels[part]).mean()), 2)
    return scores


def settings_of(arm: str, seed: int) -> PretrainSettings:
    """The settings of a run."""
    # An arm sees its clips in another order than its trunk did.
    return changed(ARMS[arm], run={"seed": seed if arm in _FROM_SCRATCH else seed + 1000})


def result_path(folder: Path, data: str, arm: str, seed: int) -> Path:
    """A run's result; its name changes with what its settings change, so an old result never stands for a new run.

    A setting that is new in vmoco, with a default that changes nothing, keeps the name.
    """
    chosen = settings_of(arm, seed).model_dump(mode="json", exclude_defaults=True)
    name = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:10]
    return folder / data / "results" / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-seed{seed}-{name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(storage.home()) / "ablation", help="data and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="one trunk each")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--report", action="store_true", help="only write the table of the runs that are done")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="data sets")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="arms")
    parser.add_argument("--one", nargs=3, metavar=("DATA", "ARM", "SEED"), help="one run alone, in this process")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.one:
        data, arm, seed = arguments.one[0], arguments.one[1], int(arguments.one[2])
        found = run_arm(data, arm, seed, folder)
        storage.write_atomic(str(result_path(folder, data, arm, seed)), json.dumps(found, indent=1).encode())
        return
    for data in arguments.data:
        make_data(folder, data)
    # Seed after seed, so that a benchmark that is stopped has all arms of some seeds.
    runs = [(data, arm, seed) for seed in arguments.seeds for data in arguments.data for arm in arguments.arms]
    missing = [run for run in runs if not result_path(folder, *run).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done, results in {folder}", flush=True)

    def start(run: tuple[str, str, int]) -> None:
        words = ["--folder", str(folder), "--one", *map(str, run)]
        command = [sys.executable, "-m", "tests.benchmarks.ablation", *words]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    if not arguments.report:
        for seed in arguments.seeds:
            for trunks in (True, False):  # an arm needs its trunk
                wave = [run for run in missing if run[2] == seed and (run[1] == TRUNK) == trunks]
                with ThreadPoolExecutor(arguments.jobs) as pool:
                    list(pool.map(start, wave))
    done = [run for run in runs if result_path(folder, *run).exists()]
    results = [json.loads(result_path(folder, *run).read_text()) for run in done]
    print(json.dumps(write_report(results, settings=BASE)))


if __name__ == "__main__":
    main()
