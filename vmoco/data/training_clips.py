"""Which clips of a data set training takes: those of videos that are not held out, less what the settings leave out.

A list of clips to leave out is a text file with one clip id in each line; what follows the id, and lines that begin
with #, are for people. jobs/dedup.py writes one. Its SHA-256 is a setting of the run, so a run that is resumed, and
whoever reads the settings of an encoder later, has the same list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data.manifest import Manifest
from vmoco.settings import flag


def training_clips(manifest: Manifest, data: DataSettings) -> pa.Table:
    """Rows of the manifest that training takes, in its order; a pure function of data set, settings and list.

    Raises:
        ValueError: the list cannot be read, is another one than at the start of the run, or is of another data set; or
            a score is needed that some clips do not have.
    """
    table = manifest.table.filter(pc.invert(manifest.table["held_out"]))
    if data.leave_out is not None:
        left_out = pa.array(sorted(read_list(manifest, data)), pa.string())
        table = table.filter(pc.invert(pc.is_in(table["clip_id"], value_set=left_out)))
    chosen = np.ones(table.num_rows, bool)
    for name, typed in _bounds(data).items():
        # Both rounded as the manifest is: 0.3 in float32 is not the 0.3 that was typed.
        bound, scores = round(float(getattr(data, name)), 2), np.round(_scores(manifest, table, name, typed), 2)
        chosen &= scores <= bound if name == "max_cuts" else scores >= bound
    return table.filter(pa.array(chosen))


def _bounds(data: DataSettings) -> dict[str, str]:
    """The settings that choose by a score, as they are typed, by name."""
    fields = type(data).model_fields
    names = ("min_motion", "min_brightness", "min_contrast", "max_cuts")
    used = [name for name in names if getattr(data, name) != fields[name].default]
    return {name: f"{flag('data', name)} {getattr(data, name):g}" for name in used}


def _scores(manifest: Manifest, table: pa.Table, name: str, typed: str) -> npt.NDArray[np.float64]:
    """The column that a setting chooses by."""
    column = table[name.partition("_")[2]]
    if column.null_count:
        raise ValueError(
            f"{typed} needs the scores of all clips, and {column.null_count} of the {len(column)} training clips of "
            f"{manifest.uri} have none, because an earlier version made them: leave the setting out, or run "
            "jobs/ingest.py into another folder"
        )
    values: npt.NDArray[np.float64] = column.to_numpy().astype(np.float64)
    return values


def reasons(data: DataSettings) -> list[str]:
    """The settings that leave clips out, as they are typed."""
    listed = [f"--data.leave-out {data.leave_out}"] if data.leave_out else []
    return [*listed, *_bounds(data).values()]


def with_list(manifest: Manifest, data: DataSettings) -> DataSettings:
    """The settings with the complete place and the hash of the list of clips to leave out, if there is one.

    Raises:
        ValueError: as `training_clips`.
    """
    if data.leave_out is None:
        return data
    uri = storage.absolute_uri(storage.require_absolute(data.leave_out, "--data.leave-out"))
    complete = data.model_copy(update={"leave_out": uri, "leave_out_sha256": _sha256(_content(uri))})
    if data.leave_out_sha256 is not None:
        complete = complete.model_copy(update={"leave_out_sha256": data.leave_out_sha256})
    read_list(manifest, complete)
    return complete


def read_list(manifest: Manifest, data: DataSettings) -> set[str]:
    """The clips to leave out.

    Raises:
        ValueError: as `training_clips`.
    """
    uri = data.leave_out
    assert uri is not None, "the caller checks that there is a list"
    content = _content(uri)
    if data.leave_out_sha256 is not None and _sha256(content) != data.leave_out_sha256:
        raise ValueError(
            f"--data.leave-out {uri} has changed: its SHA-256 is {_sha256(content)}, and --data.leave-out-sha256 is "
            f"{data.leave_out_sha256}. Restore the list, or begin a new run"
        )
    lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines()]
    named = [line.split(maxsplit=1)[0] for line in lines if line and not line.startswith("#")]
    there = set(manifest.table["clip_id"].to_pylist())
    unknown = [name for name in named if name not in there]
    if unknown:
        raise ValueError(
            f"--data.leave-out {uri} is not a list of clips of {manifest.uri}: {len(unknown)} of its {len(named)} "
            f"lines name none, the first is {unknown[0][:40]!r}. Each line begins with a clip_id of the manifest: give "
            "the list that jobs/dedup.py wrote for this data set"
        )
    return set(named)


def write_list(uri: str, clips: Iterable[tuple[str, str]], *, title: str) -> None:
    """Writes a list.

    Args:
        uri: file.
        clips: id of each clip, and what a person wants to know about it.
        title: first line, without the #.

    Raises:
        ValueError: the place cannot be written.
    """
    lines = [f"# {title}", *(f"{clip_id}  {_one_line(about)}" for clip_id, about in clips)]
    storage.write_atomic(uri, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _content(uri: str) -> bytes:
    local = storage.local_path(uri)
    try:
        if local is not None and local.is_dir():
            raise IsADirectoryError
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(
            f"--data.leave-out {uri} is not a file: give a list of clips, such as the leave_out.txt of jobs/dedup.py, "
            "which every node can read"
        ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
