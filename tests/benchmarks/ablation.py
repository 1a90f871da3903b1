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

Each run is a process of one thread. Its result is kept in `results/runs` beside this file the moment it is done, and
the weights that it ends with in the folder. Commit the results: the benchmark goes on with the runs that are missing,
also on another machine. There a trunk is trained again for the arms that its seed lacks; if it does not end with the
same bits (another type of CPU), the seed is left as it is, because arms of two trunks must not be compared. It ends by
writing `results/ablation.{json,png}` and the table into vmoco/METHOD.md, and with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks import camera
from tests.benchmarks.ablation_report import FROM_SCRATCH, RESULTS, TRUNK, write_report
from tests.benchmarks.motion_probes import motion_scores
from tests.dataset import write_data_set
from tests.train.test_loop import Notes
from tests.train.test_step import CPU, changed
from vmoco import storage
from vmoco.clip_settings import AugmentSettings, DataSettings
from vmoco.config import GeneratorSettings, MocoSettings, ModelSettings, PretrainSettings, TrainSettings
from vmoco.data import footage
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
CAMERA_VIDEOS = {
    "pretrain": camera.PRETRAIN,
    "fit": camera.FIT,
    "validation": camera.VALIDATION,
    "test": camera.TEST,
}
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
# Keys that are really old: 3.5 epochs of them, by a key encoder that moves ten times as fast. With DECAY the oldest
# weighs 0.06.
STALE: dict[str, object] = {"queue_size": 8192, "momentum": 0.9}
RANDOM: dict[str, object] = {"drop_ratio": 0.25, "start_percent": 100.0}
# As many steps as take the CPU time of an arm with a generator.
AS_LONG = {"steps": 2 * FORK_STEPS, "checkpoint_every": 2 * FORK_STEPS}
ADVERSARIAL: dict[str, object] = {"drop_ratio": 0.25}
RELATIVE = ADVERSARIAL | {"relative": True}
SAMPLED = RELATIVE | {"select": "sample"}
CONTRAST: dict[str, object] = {"objective": "contrast"}
TWO_CLIPS: dict[str, object] = {"positives": "two_clips"}
REVERSED: dict[str, object] = {"reversed_negatives_percent": 25.0}

# What decides whether a part of the method is worth having; these come first for all seeds.
DECISIVE: dict[str, PretrainSettings] = {
    TRUNK: changed(BASE, train={"steps": TRUNK_STEPS, "warmup_steps": 50, "checkpoint_every": TRUNK_STEPS}),
    "random initialisation": BASE,
    "MoCo": BASE,
    "MoCo + random dropping": changed(BASE, generator=RANDOM),
    "MoCo + adversarial dropping, relative": changed(BASE, generator=RELATIVE),
    "MoCo + adversarial dropping, relative, sampled": changed(BASE, generator=SAMPLED),
    "MoCo + two clips": changed(BASE, data=TWO_CLIPS),
    "MoCo + reversed negatives": changed(BASE, moco=REVERSED),
}
# The same question for the paper's own form, the other objective, decay, and parts together.
FURTHER: dict[str, PretrainSettings] = {
    "MoCo + adversarial dropping": changed(BASE, generator=ADVERSARIAL),
    "MoCo + adversarial dropping, relative, contrast": changed(BASE, generator=RELATIVE | CONTRAST),
    "MoCo + adversarial dropping, relative, sampled, contrast": changed(BASE, generator=SAMPLED | CONTRAST),
    "MoCo + adversarial dropping, relative, every 4th step": changed(BASE, generator=RELATIVE | {"every": 4}),
    "MoCo, old keys": changed(BASE, moco=STALE),
    "MoCo, old keys + decay": changed(BASE, moco=STALE | DECAY),
    "MoCo, old keys + two clips": changed(BASE, data=TWO_CLIPS, moco=STALE),
    "MoCo, old keys + random dropping": changed(BASE, moco=STALE, generator=RANDOM),
    "MoCo, old keys + random dropping, twice the steps": changed(BASE, moco=STALE, generator=RANDOM, train=AS_LONG),
    "VideoMoCo, old keys": changed(BASE, generator=ADVERSARIAL, moco=STALE | DECAY),
    "MoCo, momentum 0.9": changed(BASE, moco={"momentum": 0.9}),
    "MoCo + two clips + random dropping": changed(BASE, data=TWO_CLIPS, generator=RANDOM),
    "MoCo + decay": changed(BASE, moco=DECAY),
    "VideoMoCo (adversarial dropping + decay)": changed(BASE, generator=ADVERSARIAL, moco=DECAY),
    "supervised": changed(BASE, train={"steps": TRUNK_STEPS + FORK_STEPS, "warmup_steps": 50}),
}
ARMS = DECISIVE | FURTHER
Run = tuple[str, str, int]
"""Data set, arm and seed."""
RUNS = RESULTS / "runs"
"""Results of the single runs, of all machines."""


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
        seed = hash64("camera part", part) % 1000
        return camera.render(footage.fetch(), videos=CAMERA_VIDEOS[part], number=CAMERA_CLIPS[part], seed=seed)
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
    """Trains one arm on a data set and probes it; the weights that it ends with are kept in the folder."""
    torch.set_num_threads(1)
    settings = settings_of(arm, seed)
    manifest = Manifest.load(str(folder / data / "pretrain"))
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    host, started = Notes(), time.process_time()
    trunk = weights_path(folder, data, TRUNK, seed)
    if arm not in FROM_SCRATCH:
        begin_from(trunk, state)
    if arm == "supervised":
        train_supervised(state.moco.query.backbone, settings, manifest)
    elif arm != "random initialisation":
        host.show = lambda line: print(f"{data}, {arm}, seed {seed}: {line}", flush=True)  # type: ignore[method-assign]
        assert train(settings, manifest, state, device=CPU, host=host)
    result = {"data": data, "arm": arm, "seed": seed, "cpu_seconds": round(time.process_time() - started)}
    save_weights(weights_path(folder, data, arm, seed), state, both=arm == TRUNK)  # its arms start from both
    documents = [json.loads(text) for name, text in sorted(host.documents.items()) if name.endswith(".json")]
    return (
        result
        | probe(state.moco.query.backbone, settings, folder / data)
        | {
            "trunk": None if arm in FROM_SCRATCH and arm != TRUNK else storage.file_sha256(str(trunk)),
            "motion": motion_scores(weights_path(folder, data, arm, seed), folder / data / "validation"),
            "hardness": hardness(host.points, settings.train.steps),
            "metrics": host.points.get(settings.train.steps, {}),
            "dropped": documents[-1] if documents else {},
        }
    )


def save_weights(path: Path, state: TrainState, *, both: bool) -> None:
    """Writes the query encoder with its head, and with `both` the key encoder too."""
    modules = {"query": state.moco.query} | ({"key": state.moco.key} if both else {})
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    storage.write_atomic(str(path), safetensors.torch.save(tensors))


def hardness(points: Mapping[int, Mapping[str, float]], steps: int) -> float | None:
    """Mean of the tracked `adversary_hardness` over the second half of a run; None if no generator chose frames.

    A point is of one micro-batch, and the encoder adapts to what is dropped: one point alone says little.
    """
    found = [
        numbers["adversary_hardness"]
        for step, numbers in points.items()
        if 2 * step > steps and "adversary_hardness" in numbers
    ]
    return round(float(np.mean(found)), 3) if found else None


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
    return changed(ARMS[arm], run={"seed": seed if arm in FROM_SCRATCH else seed + 1000})


def result_path(folder: Path, data: str, arm: str, seed: int) -> Path:
    """A run's result; its name changes with what its settings change, so an old result never stands for a new run.

    A setting that is new in vmoco, with a default that changes nothing, keeps the name.
    """
    chosen = settings_of(arm, seed).model_dump(mode="json", exclude_defaults=True)
    name = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:10]
    return folder / data / "results" / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-seed{seed}-{name}.json"


def weights_path(folder: Path, data: str, arm: str, seed: int) -> Path:
    """The weights that a run ends with."""
    return result_path(folder, data, arm, seed).with_suffix(".safetensors")


def has_its_trunk(run: Run, folder: Path, results: Path) -> bool:
    """Whether the folder has the trunk that the results of the run's seed belong to; a run from scratch needs none."""
    data, arm, seed = run
    if arm in FROM_SCRATCH:
        return True
    weights, result = weights_path(folder, data, TRUNK, seed), result_path(results, data, TRUNK, seed)
    if not weights.exists() or not result.exists():
        return False
    expected: str = json.loads(result.read_text())["trunk"]
    return storage.file_sha256(str(weights)) == expected


def in_order(data: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """All runs, what decides most first: a benchmark that is stopped has the decisive arms of some seeds, on all data.

    Yields:
        For decisive arms and then for the others, seed after seed: the trunks, and then each arm on every data set.
    """
    for group in (DECISIVE, FURTHER):
        for seed in seeds:
            for arm in arms:
                if arm in group:
                    yield from ((name, arm, seed) for name in data)


def turn_of(run: Run) -> tuple[bool, int, bool]:
    """What is done first: decisive arms; then seed after seed, so that seeds are complete; a trunk before its arms."""
    _, arm, seed = run
    return arm not in DECISIVE, seed, arm != TRUNK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(storage.home()) / "ablation", help="data and weights")
    parser.add_argument("--results", type=Path, default=RUNS, help="results of the single runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="one trunk each")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--report", action="store_true", help="only write the table of the runs that are done")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="data sets")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="arms")
    parser.add_argument("--one", nargs=3, metavar=("DATA", "ARM", "SEED"), help="one run alone, in this process")
    arguments = parser.parse_args()
    folder, kept = arguments.folder.absolute(), arguments.results.absolute()
    if arguments.one:
        data, arm, seed = arguments.one[0], arguments.one[1], int(arguments.one[2])
        found, path = run_arm(data, arm, seed, folder), result_path(kept, data, arm, seed)
        if not path.exists():  # a trunk that is trained again, perhaps with other bits, has its result already
            storage.write_atomic(str(path), (json.dumps(found, indent=1) + "\n").encode())
        return
    for data in [] if arguments.report else arguments.data:
        make_data(folder, data)
    runs = list(in_order(arguments.data, [arm for arm in ARMS if arm in arguments.arms], arguments.seeds))
    missing = [run for run in runs if not result_path(kept, *run).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done, results in {kept}", flush=True)
    for run in dict.fromkeys((data, TRUNK, seed) for data, arm, seed in missing if arm not in FROM_SCRATCH):
        if run not in missing and not weights_path(folder, *run).exists():
            missing.append(run)  # again, on this machine
    failed: list[Run] = []

    def start(run: Run) -> None:
        if not has_its_trunk(run, folder, kept):
            failed.append(run)  # it has failed, is not among the chosen arms, or is of another type of CPU
            return
        words = ["--folder", str(folder), "--results", str(kept), "--one", *map(str, run)]
        command = [sys.executable, "-m", "tests.benchmarks.ablation", *words]
        if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            failed.append(run)

    if not arguments.report:
        for _turn, group in itertools.groupby(sorted(missing, key=turn_of), key=turn_of):
            with ThreadPoolExecutor(arguments.jobs) as pool:
                list(pool.map(start, group))
    done = [run for run in runs if result_path(kept, *run).exists()]
    results = [json.loads(result_path(kept, *run).read_text()) for run in done]
    print(json.dumps(write_report(results, settings=BASE)))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, or lack their trunk: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
