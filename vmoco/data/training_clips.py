"""Which clips of a data set training takes: those of videos that are not held out, less what the settings leave out.

A list of clips to leave out is a text file with one clip id in each line; what follows the id, and lines that begin
with #, are for people. jobs/dedup.py writes one. Its SHA-256 is a setting of the run, so a run that is resumed, and
whoever reads the settings of an encoder later, has the same list.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data.manifest import Manifest
from vmoco.settings import flag


class Selection:
    """Chooses the clips that training takes; a pure function of data set, settings and list.

    Args:
        manifest: of the data set.
        data: settings.
        others: further data sets of the run. A video that one of them holds out is held out here too.

    Attributes:
        name: what was chosen by, as text: equal for equal choices.
        columns: of the manifest that `keep` needs.

    Raises:
        ValueError: the list cannot be read, or is another one than at the start of the run.
    """

    def __init__(self, manifest: Manifest, data: DataSettings, others: Sequence[Manifest] = ()) -> None:
        self._uri, self._others = manifest.uri, others
        self._left_out = pa.array(sorted(_listed(data)), pa.string()) if data.leave_out is not None else None
        # Both rounded as the manifest is: 0.3 in float32 is not the 0.3 that was typed.
        self._typed = _bounds(data)
        self._bounds = {name: round(float(getattr(data, name)), 2) for name in self._typed}
        self._without = dict.fromkeys(self._bounds, 0)
        self._num_clips = 0
        listed = "" if self._left_out is None else _sha256("\n".join(self._left_out.to_pylist()).encode())
        self.name = f"{listed} {sorted(self._bounds.items())}{''.join(f' {each.hash}' for each in others)}"
        scores = [name.partition("_")[2] for name in self._bounds]
        self.columns = list(dict.fromkeys(["held_out", *(["video_sha256"] if others else []), *scores]))

    @functools.cached_property
    def _held_out_elsewhere(self) -> pa.Array:
        """Hashes of the files that another data set holds out."""
        found: set[str] = set()
        for each in self._others:
            for piece in each.batches(["video_sha256", "held_out"]):
                found.update(piece.filter(piece["held_out"])["video_sha256"].unique().to_pylist())
        return pa.array(sorted(found), pa.string())

    def keep(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which of some rows of the manifest are taken, bool (number of rows,)."""
        kept = ~table["held_out"].to_numpy()
        if self._others:
            kept &= ~pc.is_in(table["video_sha256"], value_set=self._held_out_elsewhere).to_numpy()
        if self._left_out is not None:
            kept &= ~pc.is_in(table["clip_id"], value_set=self._left_out).to_numpy()
        self._num_clips += int(kept.sum())
        of_all = kept.copy()
        for name, bound in self._bounds.items():
            scores = np.round(table[name.partition("_")[2]].to_numpy().astype(np.float64), 2)  # NaN where there is none
            self._without[name] += int(np.isnan(scores[of_all]).sum())
            kept &= scores <= bound if name == "max_cuts" else scores >= bound
        return kept

    def check(self) -> None:
        """Checks, when all rows were seen, that each clip had the scores that it was chosen by.

        Raises:
            ValueError: some have none.
        """
        for name, count in self._without.items():
            if count:
                raise ValueError(
                    f"{self._typed[name]} needs the scores of all clips, and {count} of the {self._num_clips} training "
                    f"clips of {self._uri} have none, because an earlier version made them: leave the setting out, or "
                    "run jobs/ingest.py into another folder"
                )


def _bounds(data: DataSettings) -> dict[str, str]:
    """The settings that choose by a score, as they are typed, by name."""
    fields = type(data).model_fields
    names = ("min_motion", "min_brightness", "min_contrast", "max_cuts")
    used = [name for name in names if getattr(data, name) != fields[name].default]
    return {name: f"{flag('data', name)} {getattr(data, name):g}" for name in used}


def reasons(data: DataSettings) -> list[str]:
    """The settings that leave clips out, as they are typed."""
    listed = [f"--data.leave-out {data.leave_out}"] if data.leave_out else []
    return [*listed, *_bounds(data).values()]


def with_list(manifests: Sequence[Manifest], data: DataSettings) -> DataSettings:
    """The settings with the complete place and the hash of the list of clips to leave out, if there is one.

    Raises:
        ValueError: the list cannot be read, is another one than at the start of the run, or is of another data set; or
            a score is needed that some clips do not have.
    """
    if data.leave_out is None:
        return data
    uri = storage.absolute_uri(storage.require_absolute(data.leave_out, "--data.leave-out"))
    complete = data.model_copy(update={"leave_out": uri, "leave_out_sha256": _sha256(_content(uri))})
    if data.leave_out_sha256 is not None:
        complete = complete.model_copy(update={"leave_out_sha256": data.leave_out_sha256})
    check_list(manifests, complete)
    return complete


def check_list(manifests: Sequence[Manifest], data: DataSettings) -> None:
    """Checks that the clips to leave out are clips of the data sets.

    Raises:
        ValueError: they are not, or the list cannot be read, or is another one than at the start of the run.
    """
    named = _listed(data)
    there: set[str] = set()
    for manifest in manifests:
        for piece in manifest.batches(["clip_id"]):
            there |= named.keys() & set(piece["clip_id"].to_pylist())
    if unknown := named.keys() - there:
        first = min(unknown, key=named.__getitem__)
        raise ValueError(
            f"--data.leave-out {data.leave_out} is not a list of clips of "
            f"{', '.join(each.uri for each in manifests)}: {len(unknown)} of its {len(named)} lines name none, "
            f"the first is {first[:40]!r}. Each line begins with a clip_id of the manifest: give the list that "
            "jobs/dedup.py wrote for this data set"
        )


def _listed(data: DataSettings) -> dict[str, int]:
    """The clips of the list, by the number of their line.

    Raises:
        ValueError: the list cannot be read, or is another one than at the start of the run.
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
    return {line.split(maxsplit=1)[0]: at for at, line in enumerate(lines) if line and not line.startswith("#")}


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
