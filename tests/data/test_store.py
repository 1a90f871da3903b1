"""Ingest from and to an object store that fails: it is patient, then clear, and nothing half-written has a name."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data import videos
from tests.data.test_ingest_tasks import settings
from tests.decoding import InProcess
from tests.made import encoder_of
from tests.names import FOLDER, NAMES
from tests.store import BUCKET, Fault, Store
from vmoco import storage
from vmoco.data import source
from vmoco.data.annotations import list_annotated
from vmoco.data.check import check
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder
from vmoco.data.found import Found
from vmoco.data.ingest_plan import ProbeTask, plan_shards
from vmoco.data.ingest_tasks import make_shard, probe_videos
from vmoco.data.ledger import ScratchError, VideoError
from vmoco.data.manifest import FIELDS, Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.ranged_file import RangedFile
from vmoco.data.source import list_videos, local_copy, ranged, readable
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Window
from vmoco.evaluate.table import part_rejected

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WAITS_SECONDS", (0.01, 0.02, 0.03))


def test_what_fails_for_a_while_succeeds(store: Store, tmp_path: Path) -> None:
    """Through 500s, listing, reading, copying and writing come in the end."""
    storage.write_atomic(f"s3://{BUCKET}/in/a b é.mp4", b"content")
    for method, path in (("GET", "in/a"), ("GET", f"/{BUCKET}$"), ("PUT", "out"), ("POST", "out")):
        store.faults.append(Fault(method, path, times=3, status="500 Internal Server Error"))
    root = f"s3://{BUCKET}/in"
    (found,) = list_videos(root).videos
    with local_copy(root, found) as path:
        assert Path(path).read_bytes() == b"content"
        assert path.endswith(".mp4")
    assert not Path(path).exists()
    with storage.open_atomic(f"s3://{BUCKET}/out/file") as file:
        file.write(b"written")
    assert store.content("out/file") == b"written"
    assert [fault.times for fault in store.faults[:2]] == [0, 0]


def test_what_goes_on_failing_is_told(store: Store) -> None:
    """A video that cannot be read is rejected for now; a file that cannot be written is an error, and is not there."""
    storage.write_atomic(f"s3://{BUCKET}/in/a.mp4", b"content")
    store.faults.append(Fault("GET", "in/a", times=10**6, status="500 Internal Server Error"))
    with pytest.raises(VideoError) as caught, local_copy(f"s3://{BUCKET}/in", Found("a.mp4", 7)):
        pass
    assert (caught.value.stage, caught.value.reason, caught.value.transient) == ("read", "read-error", True)
    store.faults.append(Fault("PUT", "out", times=10**6, status="403 Forbidden"))
    store.faults.append(Fault("POST", "out", times=10**6, status="403 Forbidden"))
    with pytest.raises(ValueError, match=rf"cannot write s3://{BUCKET}/out/file: .*(ACCESS_DENIED|403)"):
        storage.write_atomic(f"s3://{BUCKET}/out/file", b"x" * 2**23)
    assert store.names("out") == []


def test_any_name_gives_what_it_gives_in_a_folder(store: Store, tmp_path: Path) -> None:
    """Videos with characters that URIs and patterns use, read from S3 and cut to S3: the clips of a local folder.

    The data set, in a folder with such a name, is checked and read back; each video is embedded too.
    """
    root = f"s3://{BUCKET}/{FOLDER}"
    for number, name in enumerate(NAMES):
        path = videos.write_video(tmp_path / FOLDER / "in" / name, videos.images(9 + number))
        store.client.put_object(Bucket=BUCKET, Key=f"{FOLDER}/in/{name}", Body=path.read_bytes())
    decoder, tables = Decoder(), []
    for place in (str(tmp_path / FOLDER), root):
        chosen = settings(tmp_path, videos=f"{place}/in", output=f"{place}/out")
        found = list_videos(chosen.videos).videos
        assert [video.video_id for video in found] == sorted(NAMES)
        (plan,) = plan_shards(
            probe_videos(ProbeTask(found), root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder),
            chosen,
        )
        made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
        assert made.rejected == ()
        write_manifest(
            chosen.output,
            pa.Table.from_pylist(made.rows, schema=pa.schema(FIELDS)),
            settings=chosen.content(),
            frame_shape=chosen.frame_shape,
            encoding=chosen.encoding,
            shards={made.name: made.file},
            num_rejected=0,
        )
        assert check(chosen.output, lambda line: None) == []
        tables.append(Manifest.load(chosen.output).table)
        task = EmbedTask(encoder_of(num_frames=4), Work(output=f"{place}/table", window=Window(4, 1), batch_size=4))
        files = [(video.video_id, video.num_bytes) for video in found]
        plan_of_table = json.dumps({"folder": chosen.videos, "videos": files})
        assert task({"part": "part", "plan": plan_of_table})["error"] == ""
        assert part_rejected(f"{place}/table", "part") == []
    decoder.close()
    assert tables[0] == tables[1]
    assert f"{FOLDER}/table/parts/part.parquet" in store.names(FOLDER)
    named = ranged(f"{root}/in", found[-1])
    assert readable(named).read() == Path(tmp_path, FOLDER, "in", found[-1].path).read_bytes()  # type: ignore[union-attr]
    # One video of the folder can be chosen by a pattern, and one folder by its name.
    assert len(list_videos(f"{root}/in/[[]g].m*").videos) == 1


@pytest.mark.parametrize("most_folders", [0, 1000], ids=["at once", "folder by folder"])
def test_a_name_that_is_no_path_is_a_row(store: Store, monkeypatch: pytest.MonkeyPatch, most_folders: int) -> None:
    """An object whose name has an empty part, `.` or `..` is in the ledger and ends no job; the others are listed."""
    monkeypatch.setattr(source, "MAX_FOLDERS", most_folders)
    bad = ("x//b.mp4", "x/./c.mp4", "x/../d.mp4", "/e.mp4", "./f.mp4", "../g.mp4")
    for name in ("a.mp4", "y/z/h.mp4", "y/i.mp4", *bad):
        store.client.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=b"content")
    listing = list_videos(f"s3://{BUCKET}/in")
    assert [found.video_id for found in listing.videos] == ["a.mp4", "y/i.mp4", "y/z/h.mp4"]
    assert {(row.video_id, row.reason) for row in listing.rejected} == {(name, "name-not-a-path") for name in bad}


def test_a_store_is_opened_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names of a bucket share one connection; another address in the environment is another store."""
    filesystem, path = storage.filesystem(f"s3://{BUCKET}/a%20b?c#d/")
    assert path == f"{BUCKET}/a%20b?c#d"
    assert storage.filesystem(f"s3://{BUCKET}/x")[0] is filesystem
    assert storage.free_bytes(f"s3://{BUCKET}/x") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert storage.filesystem(f"s3://{BUCKET}/x")[0] is not filesystem


class FullDisk(io.FileIO):
    """A file on a disk without space: the kernel's own, which only cannot be truncated."""

    def truncate(self, size: int | None = None) -> int:
        return 0


def test_a_full_disk_is_not_the_fault_of_the_video(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that does not fit on this machine's disk ends the job, and names the folder and what to do."""
    storage.write_atomic(f"s3://{BUCKET}/in/a.mp4", b"content")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: FullDisk("/dev/full", "r+"))
    message = (
        rf"cannot copy a video to {tempfile.gettempdir()}: No space left on device; free space there, or set TMPDIR"
    )
    with pytest.raises(ScratchError, match=message), local_copy(f"s3://{BUCKET}/in", Found("a.mp4", 7)):
        pass


def test_parts_are_read_by_ranges(store: Store, tmp_path: Path) -> None:
    """A part of a long remote video is decoded from ranges of it; a few of them may fail."""
    coding = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}
    path = videos.write_video(tmp_path / "a.mp4", videos.images(200, height=480, width=640), options=coding)
    storage.write_atomic(f"s3://{BUCKET}/in/a.mp4", path.read_bytes())
    decoder, plan = Decoder(), ClipPlan(4)
    parts = decoder.probe(str(path), plan, part_seconds=2, seconds=60).parts
    options = {"size": (24, 32), "encoding": "raw", "quality": 92, "offset": 0, "seconds": 60}
    source = ranged(f"s3://{BUCKET}/in", Found("a.mp4", path.stat().st_size))
    store.faults.append(Fault("GET", "in/a", times=4, status="500 Internal Server Error"))
    found = []
    for at in (str(path), source):
        made = decoder.cut(at, plan, extent=parts[2], **options)  # type: ignore[arg-type]
        found.append((made, os.pread(decoder.scratch.fileno(), sum(made.sizes), 0)))
    assert found[0] == found[1]
    assert store.faults[0].times == 0
    decoder.close()


def test_a_remote_video_is_copied_once_and_its_runs_are_ranges(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing copies it; cutting reads the ranges of its runs, and copies it again where all of it is decoded."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (240, 320, 3), np.uint8) for _ in range(10)] * 30
    path = videos.write_video(tmp_path / "a.mov", images, codec="mjpeg", pix_fmt="yuvj444p")
    size = path.stat().st_size
    store.client.upload_file(str(path), BUCKET, "in/a.mov")
    copied, ranges = list[int](), list[int]()
    honest_copy, honest_read = source._copy, RangedFile.read

    def copy(*arguments: Any) -> int:
        copied.append(honest_copy(*arguments))
        return copied[-1]

    def read(file: RangedFile, size: int = -1) -> bytes:
        content = honest_read(file, size)
        ranges.append(len(content))
        return content

    monkeypatch.setattr(source, "_copy", copy)
    monkeypatch.setattr(RangedFile, "read", read)
    for max_clips, copies in ((2, 1), (1000, 2)):
        copied.clear()
        ranges.clear()
        places = {"videos": f"s3://{BUCKET}/in", "output": str(tmp_path / str(max_clips))}
        chosen = settings(tmp_path, **places, max_clips_per_video=max_clips)
        work: dict[str, Any] = {"root": chosen.videos, "output": chosen.output, "settings": chosen}
        task = ProbeTask(list_videos(chosen.videos).videos)
        probed = probe_videos(task, **work, decoder=InProcess())
        assert (copied, ranges) == ([size], [])
        (plan,) = plan_shards(probed, chosen)
        assert make_shard(plan, **work, decoder=InProcess()).rejected == ()
        assert copied == [size] * copies
        assert 0 < sum(ranges) < 0.6 * size if copies == 1 else not ranges


# A task from S3 to S3 in a process of its own; prints by how many MiB its memory grew, and the size of its shard.
TASK = """
import sys, threading, time
from pathlib import Path
from tests.data.test_ingest_tasks import settings
from vmoco.data.decoder import Decoder
from vmoco.data.ingest_plan import Probed
from vmoco.data.ingest_plan import plan_shards
from vmoco.data.ingest_tasks import make_shard
from vmoco.data.source import list_videos
def own_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024
peak = 0.0
def watch():
    global peak
    while True:
        peak = max(peak, own_mib())
        time.sleep(0.01)
def made(name):
    places = {"videos": sys.argv[1] + name, "output": sys.argv[1] + "out"}
    chosen = settings(Path(), **places, num_frames=16, height=256, width=256, max_clips_per_video=1000)
    (plan,) = plan_shards([Probed(found, "hash") for found in list_videos(chosen.videos).videos], chosen)
    return make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
decoder = Decoder()
made("small")  # all libraries are loaded, all connections open
before = own_mib()
threading.Thread(target=watch, daemon=True).start()
print(made("large").file.num_bytes / 2**20, peak - before)
decoder.close()
"""


def test_a_slow_store_does_not_fill_memory(store: Store, tmp_path: Path) -> None:
    """A task reads a large video from a slow store and writes a large shard to it: its memory grows by neither."""
    for name, count, padding in (("small", 20, 8), ("large", 480, 2**26)):
        path = videos.write_video(tmp_path / name / "a.mp4", videos.images(count))
        whole = path.read_bytes() + padding.to_bytes(4, "big") + b"free" + bytes(padding - 8)
        storage.write_atomic(f"s3://{BUCKET}/in/{name}/a.mp4", whole)
    store.faults.append(Fault("PUT", "out/shards", times=10**6, seconds=0.2))
    store.faults.append(Fault("GET", "in/large", times=10**6, seconds=0.1))
    command = [sys.executable, "-c", TASK, f"s3://{BUCKET}/in/"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shard_mib, grown_mib = map(float, done.stdout.split())
    assert shard_mib > 85
    assert grown_mib < 50


def run_job(store: Store, output: str, *words: str) -> subprocess.CompletedProcess[str]:
    chosen = settings(Path("/unused"), videos=f"s3://{BUCKET}/in", output=output)
    changed = chosen.model_dump(exclude_defaults=True)
    flags = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "jobs/ingest.py", *flags, "--videos-per-shard", "1", *words]
    return subprocess.run(
        command, env=environment | store.environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_job_is_patient_and_then_clear(store: Store, tmp_path: Path) -> None:
    """From S3 to S3 through 500s and slow reads to a whole data set; a refused write ends it with one sentence.

    What was there before stays as it was, and no name of the failed run is visible.
    """
    for number in range(2):
        path = videos.write_video(tmp_path / f"{number}.mp4", videos.images(20 + number))
        storage.write_atomic(f"s3://{BUCKET}/in/{number}.mp4", path.read_bytes())
    store.faults += [
        Fault("GET", r"in/0\.mp4", times=4, status="500 Internal Server Error"),
        Fault("GET", r"in/1\.mp4", times=2, seconds=2.0),
        Fault("PUT", "out/shards", times=4, status="500 Internal Server Error"),
    ]
    output = f"s3://{BUCKET}/out"
    done = run_job(store, output)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(output)
    assert manifest.counts == {"videos": 2, "clips": 6, "rejected": 0, "held_out": 0}
    assert check(output, lambda line: None) == []
    before = {name: store.content(name) for name in store.names("out")}
    assert "out/contact_sheet.png" in before
    assert not [name for name in before if "probes" in name or name.endswith(".tmp")]

    path = videos.write_video(tmp_path / "2.mp4", videos.images(33))
    storage.write_atomic(f"s3://{BUCKET}/in/2.mp4", path.read_bytes())
    for method in ("PUT", "POST"):
        store.faults.append(Fault(method, "out/shards", times=10**6, status="403 Forbidden"))
    done = run_job(store, output)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {output}/shards/")
    assert "Traceback" not in done.stderr
    after = {name: store.content(name) for name in store.names("out") if "probes" not in name}
    assert after == before
    assert Manifest.load(output) == manifest


def test_a_list_is_copied_once_to_be_read_often(store: Store) -> None:
    """A text list is read for its kind, its header, its form and its entries: two copies, and no temporary folder."""
    for name in ("a.mp4", "b.mp4"):
        storage.write_atomic(f"s3://{BUCKET}/in/{name}", b"content")
    uri = f"s3://{BUCKET}/list.txt"
    storage.write_atomic(uri, b"a.mp4 1\nb.mp4 2\ngone.mp4 3\n")
    before = set(os.listdir(tempfile.gettempdir()))
    store.requests.clear()
    listing = list_annotated(f"s3://{BUCKET}/in", uri, "auto")
    assert [(found.video_id, found.label) for found in listing.videos] == [("a.mp4", "1"), ("b.mp4", "2")]
    assert sum(method == "GET" and path.endswith("list.txt") for method, path in store.requests) == 2
    assert set(os.listdir(tempfile.gettempdir())) <= before
    missing = f"s3://{BUCKET}/none.txt"
    with pytest.raises(ValueError, match=f"list {missing} cannot be read"):
        list_annotated(f"s3://{BUCKET}/in", missing, "filelist")
