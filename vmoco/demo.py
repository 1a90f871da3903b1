"""The complete service on one machine, as `make demo` shows it: from videos to an encoder that is pulled by name.

It does what a user would type, in the same order: it starts a Ray head, submits the jobs, stops the head, and compares
the encoder with random weights in a new process without Ray. All that it keeps lies below $VMOCO_HOME.

A few long videos are cut into parts of a few seconds, each of which counts as a video and as a source (column `group`
of the list). Mean colour tells ten whole videos apart, so a score over them shows nothing; parts of one video share
their colours. The score is then of films that were trained on: it compares encoders, and says nothing of other films.
Of a folder with many videos it takes some, because it is to end in five minutes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vmoco import storage
from vmoco.cluster.local import LocalCluster
from vmoco.data import source
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder
from vmoco.data.ledger import VideoError
from vmoco.job_settings import IngestSettings
from vmoco.mlflow_internals import JOB_EXECUTION

ENCODER = "models:/videomoco-demo@candidate"
PAGE = "before-after.html"
FEW_VIDEOS = 20
"""With at most so many videos, long ones are cut into parts."""
MAX_VIDEOS = 40
"""Most videos of a folder that it takes, evenly spread over their names."""
PART_SECONDS, MAX_PARTS = 3, 8
"""Length of a part, and most parts of one video."""
_PROBE_SECONDS = 60.0
_ROOT = Path(__file__).resolve().parents[1]

Part = tuple[str, int | str, int | str]
"""A video, and the first and last second of a part of it; empty texts for the complete video."""


class StepFailedError(Exception):
    """A step of the demo failed. It has printed the reason itself."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"the demo ended in step {name!r} with exit code {code}; the lines above say why")
        self.code = code


class Announcer:
    """Prints which step begins, and how many seconds after the start."""

    def __init__(self, num_steps: int) -> None:
        self._begin = time.monotonic()
        self._num_steps = num_steps
        self._step = 0

    def __call__(self, text: str) -> None:
        self._step += 1
        seconds = time.monotonic() - self._begin
        print(f"\n[{seconds:4.0f} s] step {self._step} of {self._num_steps}: {text}", flush=True)


def run(*, videos: str | None = None, dashboard_port: int | None = None) -> None:
    """Takes videos to an encoder that can be pulled by name, on this machine.

    Args:
        videos: Folder or URI of your videos, such as ~/videos. Default: the videos of a few PyPI packages.
        dashboard_port: Port of Ray's job server and dashboard on 127.0.0.1, such as 8265. Default: any free port.

    Raises:
        ValueError: there are no videos, the port is taken, or $VMOCO_HOME cannot be written.
        StepFailedError: a job failed.
    """
    storage.check_writable(storage.home())
    # At least two CPUs for Ray, also where there is one: the preset has two workers, and the demo is to show them.
    cluster = LocalCluster(num_cpus=max(2, len(os.sched_getaffinity(0))), dashboard_port=dashboard_port)
    announce = Announcer(6)
    announce("footage")
    place = _footage(videos)
    chosen = choose(place)
    settings = ingest_settings(place, chosen)
    if settings.annotations:
        storage.write_atomic(settings.annotations, chosen.listed.encode())
        print(f"{chosen.note}, listed in {settings.annotations}", flush=True)
    announce("a local Ray cluster")
    with cluster:
        print(f"job server and dashboard: {cluster.address}", flush=True)
        announce(f"ingest: videos in {settings.videos} -> Arrow shards in {settings.output}")
        _check("ingest", cluster.submit(["python", "jobs/ingest.py", *flags(settings)], _ROOT))
        announce(f"pretrain: two workers -> {ENCODER}")
        _check("pretrain", cluster.submit(["python", "jobs/pretrain.py", "demo", "--data.uri", settings.output], _ROOT))
    announce("before and after: random weights beside the encoder pulled by name, in a new process without Ray")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    page = Path(settings.output.removesuffix("/") + "-page") / PAGE
    if storage.local_path(settings.output) is None:  # a browser opens it from this machine
        page = Path.cwd() / PAGE
    compare = [sys.executable, "jobs/compare.py", ENCODER, "--data", settings.output, "--page", str(page)]
    _check("before and after", subprocess.run(compare, env=environment, cwd=_ROOT, check=False).returncode)
    announce("done; what to do next")
    print(next_commands())


@dataclass(frozen=True)
class Choice:
    """What the demo takes of the videos."""

    listed: str = ""
    """List of videos or parts of videos (CSV); empty where all are taken as they are."""
    note: str = ""
    """What the list holds, for the user."""
    max_clips: int = 24
    """Most clips of each."""
    videos_per_shard: int = 1


def ingest_settings(videos: str, chosen: Choice = Choice()) -> IngestSettings:
    """Small frames and few clips. The name of the data set's folder follows from what decides its content.

    Args:
        videos: folder or URI.
        chosen: what is taken of them; its list is to be written as `annotations`.
    """
    settings = IngestSettings(
        videos=videos,
        output="-",
        height=80,
        width=107,  # 4:3, for square crops
        max_clips_per_video=chosen.max_clips,
        held_out_percent=30,
        videos_per_shard=chosen.videos_per_shard,
    )
    content = json.dumps([videos, chosen.listed, settings.content()], sort_keys=True)
    name = f"demo-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    output = storage.join(storage.home(), "data", name)
    made = {"output": output} | ({"annotations": f"{output}.csv"} if chosen.listed else {})
    return IngestSettings(**settings.model_dump() | made)


def choose(videos: str) -> Choice:
    """Chooses what of the videos in a folder the demo takes; a URI or a list is taken as it is.

    Of more than `MAX_VIDEOS` videos it takes so many, and of more than `FEW_VIDEOS` fewer clips of each. Fewer videos
    are cut into parts, if one is long enough. A video that cannot be read stays on the list, so that ingest says why.
    """
    if not os.path.isdir(storage.local_path(videos) or ""):
        return Choice()
    listing = source.list_videos(videos)
    names = [found.path for found in listing.videos]
    if len(names) > MAX_VIDEOS:
        places = [round(place * (len(names) - 1) / (MAX_VIDEOS - 1)) for place in range(MAX_VIDEOS)]
        listed = _as_list([(names[place], "", "") for place in places])
        note = f"{MAX_VIDEOS} of the {len(names)} videos, so that the demo is short (jobs/ingest.py takes all)"
        return Choice(listed, note, max_clips=8)
    if len(names) > FEW_VIDEOS:
        return Choice(max_clips=8)
    rows: list[Part] = [(row.video_id, "", "") for row in listing.rejected]
    decoder = Decoder()  # in a process of its own: a damaged video may crash it
    try:
        for name in names:
            try:
                path = str(Path(str(storage.local_path(videos)), name))
                plan = ClipPlan(num_frames=16)
                contents = decoder.probe(path, plan, part_seconds=_PROBE_SECONDS, seconds=_PROBE_SECONDS)
                rows += [(name, *part) for part in parts_of(contents.duration)]
            except VideoError:
                rows.append((name, "", ""))
    finally:
        decoder.close()
    if len(rows) == len(names) + len(listing.rejected):
        return Choice()
    note = f"up to {MAX_PARTS} parts of {PART_SECONDS} s of each long video count as videos"
    return Choice(_as_list(rows), note, max_clips=4, videos_per_shard=4)  # as many clips as fit into a part


def _as_list(rows: list[Part]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("path", "start_seconds", "end_seconds", "group")]
        + [(name, start, end, "" if start == "" else f"{name}#{start}-{end}") for name, start, end in rows]
    )
    return text.getvalue()


def parts_of(seconds: float) -> list[tuple[int | str, int | str]]:
    """First and last second of the parts of a video, evenly spread; empty texts where it is too short for two."""
    fit = int(seconds // PART_SECONDS)
    if fit < 2:
        return [("", "")]
    count = min(fit, MAX_PARTS)
    numbers = [round(place * (fit - 1) / (count - 1)) for place in range(count)]
    return [(number * PART_SECONDS, (number + 1) * PART_SECONDS) for number in numbers]


def flags(settings: IngestSettings) -> list[str]:
    """The settings that differ from their defaults, as flags of `jobs/ingest.py`."""
    changed = settings.model_dump(exclude_defaults=True)
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def next_commands() -> str:
    """The commands that open the MLflow UI, list the encoder, and use it."""
    from vmoco import tracking

    uri = tracking.tracking_uri()
    python, mlflow = (shlex.quote(str(Path(sys.executable).parent / name)) for name in ("python", "mlflow"))
    name = ENCODER.removeprefix("models:/").partition("@")[0]
    if uri.startswith(("http://", "https://")):
        ui = uri
    else:  # without job execution the server is 2 processes instead of 10
        ui = f"{JOB_EXECUTION}=false {mlflow} ui --backend-store-uri {shlex.quote(uri)} --workers 1"
    home = f"VMOCO_HOME={shlex.quote(storage.home())} " if "VMOCO_HOME" in os.environ else ""
    listing = f"import mlflow; print(mlflow.MlflowClient().get_registered_model('{name}'))"
    return "\n".join(
        [
            "the runs, in a browser (then open http://127.0.0.1:5000):",
            f"  {ui}",
            "the encoder, its versions and aliases:",
            f'  MLFLOW_TRACKING_URI={shlex.quote(uri)} {python} -c "{listing}"',
            f"the encoder in Python ({home}{python}):",
            "  import vmoco",
            f'  encoder = vmoco.load_encoder("{ENCODER}")',
        ]
    )


def _footage(videos: str | None) -> str:
    if videos is None:
        from vmoco.data import footage

        return str(footage.fetch())
    uri = storage.absolute_uri(videos)
    if not storage.exists(uri):
        raise ValueError(f"--videos {videos} does not exist: give a folder, or a URI prefix, that holds videos")
    return uri


def _check(name: str, code: int) -> None:
    if code:
        raise StepFailedError(name, code)
