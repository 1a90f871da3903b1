"""A data set is checked to its last byte, and what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataset import make_data_set
from vmoco.data import ledger
from vmoco.data.check import check
from vmoco.data.frames import Encoding
from vmoco.data.ledger import Loss, Rejection
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.shard_reader import ClipReader

ROOT = Path(__file__).parents[2]


def quiet(line: str) -> None:
    pass


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)


@pytest.fixture(params=["raw", "jpeg"])
def data_set(tmp_path: Path, request: pytest.FixtureRequest) -> Manifest:
    encoding: Encoding = request.param
    return make_data_set(tmp_path, encoding=encoding)


def test_a_whole_data_set_has_nothing_wrong(data_set: Manifest) -> None:
    """No finding, and a last line that counts all shards."""
    lines: list[str] = []
    assert check(data_set.uri, progress=lines.append) == []
    assert re.fullmatch(r"check  read 2/2 shards  wrong 0  [\d.]+ shards/s  0:00 left", lines[-1])


def as_version_2(data_set: Manifest) -> None:
    """Turns a data set into one of the version before, whose shards have the hashes of all their bytes."""
    for name in data_set.shards:
        path = Path(data_set.shard_uri(name))
        with pa.ipc.open_file(str(path)) as reader:
            schema, batches = reader.schema, [reader.get_batch(row) for row in range(reader.num_record_batches)]
        metadata = {key: value.replace(b'"version": 3', b'"version": 2') for key, value in schema.metadata.items()}
        with pa.ipc.new_file(str(path), schema.with_metadata(metadata)) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(metadata))
    path = Path(data_set.uri) / NAME
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"vmoco"]) | {"version": 2}
    for name, file in about["shards"].items():
        content = Path(data_set.shard_uri(name)).read_bytes()
        file |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        del file["by_clips"]
    pq.write_table(table.replace_schema_metadata({"vmoco": json.dumps(about)}), path)


def test_a_data_set_of_the_version_before_is_read_and_checked(data_set: Manifest) -> None:
    """With the clips as they are; a flipped bit is found in it too."""
    expected = [ClipReader.of(data_set).frames(clip) for clip in range(3)]
    as_version_2(data_set)
    old = Manifest.load(data_set.uri)
    assert not any(file.by_clips for file in old.shards.values())
    assert check(old.uri, quiet) == []
    for clip, frames in enumerate(expected):
        np.testing.assert_array_equal(ClipReader.of(old).frames(clip), frames)
    path = Path(old.shard_uri("0001"))
    flip(path, path.stat().st_size - 1)
    assert any(finding.startswith("shard 0001: ") for finding in check(old.uri, quiet))


def test_a_flipped_bit_is_named(data_set: Manifest) -> None:
    """In a clip: the shard, the row and the clip; between clips: the shard."""
    row = data_set.table.to_pylist()[5]
    path = Path(data_set.shard_uri(row["shard"]))
    flip(path, row["offset"] + row["num_bytes"] // 2)
    findings = check(data_set.uri, quiet)
    clip = f"shard {row['shard']}, row {row['row']}, clip {row['clip_id']} of '{row['video_id']}': "
    assert findings[0].startswith(clip + "its checksum is wrong")
    assert findings[1].startswith(f"shard {row['shard']}: its SHA-256 is ")
    assert len(findings) == 2
    flip(path, row["offset"] + row["num_bytes"] // 2)
    flip(path, row["offset"] - 1)
    assert check(data_set.uri, quiet)[0].startswith(f"shard {row['shard']}: its SHA-256 is ")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_shard_is_named(data_set: Manifest, share: float) -> None:
    """The size is wrong, and it is no whole Arrow file; nothing raises."""
    path = Path(data_set.shard_uri("0001"))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: int(size * share)])
    findings = check(data_set.uri, quiet)
    assert any("shard 0001" in finding and "truncated or not an Arrow file" in finding for finding in findings)
    assert not any("0000" in finding for finding in findings)


def test_what_a_manifest_gets_wrong_is_named(data_set: Manifest) -> None:
    """A row more, less or changed: the hash, the counts, the field."""
    path = Path(data_set.uri) / NAME
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    findings = check(data_set.uri, quiet)
    assert findings[0].startswith(f"manifest: its hash is {data_set.hash}, and that of its rows is ")
    assert findings[1:] == ["manifest: it counts 24 clips, and the manifest has 23"]
    labels = ["wrong", *[None] * (table.num_rows - 1)]
    pq.write_table(table.set_column(table.column_names.index("label"), "label", [labels]), path)
    assert check(data_set.uri, quiet) == ["shard 0000, row 0: label differ from the manifest"]


def test_the_ledger_is_summed_up(data_set: Manifest) -> None:
    """How many videos were rejected for each reason; a number that the manifest does not count is an error."""
    rejections = [Rejection(f"{n}.mp4", "probe", "empty" if n % 3 else "truncated", "why") for n in range(7)]
    loss = Loss("a.mp4", ((0.0, 1.0),), 3.0, "why")
    ledger.write(data_set.uri, rejections, [loss])
    said: list[str] = []
    assert check(data_set.uri, said.append) == ["manifest: it counts 0 rejected, and the ledger has 7"]
    expected = f"check  7 videos are rejected: empty 4, truncated 3; see {data_set.uri}/ledger.jsonl"
    assert said[0] == expected


def test_the_job_ends_with_what_is_wrong(tmp_path: Path) -> None:
    """Exit code 0 and a sentence, or 1, the findings and a last line that says what to do."""
    data_set = make_data_set(tmp_path)
    command = [sys.executable, "jobs/check.py", "data", data_set.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"data set {tmp_path} is complete")
    flip(Path(data_set.shard_uri("0000")), data_set.table.to_pylist()[0]["offset"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "shard 0000, row 0, clip " in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: data set {tmp_path} has 2 errors, listed above: ")
