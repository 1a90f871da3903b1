"""The videos in tar files, as data sets are shipped: where each one lies, so it is read by ranges and never unpacked.

    part_0.tar    | header | run/a.mp4 ... | header | run/b.mp4 ... | end

A video's name is the path of its tar file and its own path in it: `part_0.tar/run/a.mp4`. A file beside it may have its
label, as in WebDataset: `a.cls`, or the field `label` or `cls` of `a.json`.

Listing reads the headers alone. A compressed tar file is refused: each video in it could only be read after everything
before it, by every task again. To uncompress it once costs almost no space, because videos do not shrink further.
"""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from vmoco import storage
from vmoco.data.endings import COMPRESSED_TARS, Wanted, is_mpeg
from vmoco.data.found import Found, TarMember
from vmoco.data.gathered import gather
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.ranged_file import RangedFile
from vmoco.data.source import Listing, rejection

_THREADS = 16
_AHEAD = 256
"""Tar files whose contents are in memory at once."""
_WINDOW_BYTES = 2**16
"""Bytes that are read at once: small members such as labels lie between two headers."""
_MOST_HEADER_BYTES = 2**22
"""Largest header: a damaged one may state any size, and memory must hold it."""
_MOST_LABEL_BYTES = 2**14
_BLOCK = 512
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_UNPACKERS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}


@dataclasses.dataclass(frozen=True)
class _Member:
    """A file in a tar file, or a link to one."""

    offset: int = 0
    num_bytes: int = 0
    begin: bytes = b""
    """Its first bytes, where these must tell that it is a video."""
    target: str | None = None
    """Name of the member that it is a link to."""
    problem: tuple[str, str] | None = None
    """Reason and message, if it is no file that can be read by a range."""


@dataclasses.dataclass
class _Contents:
    """What the headers of a tar file say."""

    tar: str
    members: dict[str, _Member] = dataclasses.field(default_factory=dict)
    """By name; of several with one name the last, as when the file is unpacked."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of files beside videos, by the name up to its first dot."""
    rejected: list[Rejection] = dataclasses.field(default_factory=list)
    num_repeated: int = 0
    num_absolute: int = 0


def list_tars(root: str, tars: Sequence[str], suffixes: Sequence[str] = ()) -> Listing:
    """Lists the videos in tar files.

    Args:
        root: Folder or URI prefix of the tar files.
        tars: Their paths below it.
        suffixes: More endings of videos.

    Raises:
        ValueError: a suffix is not an ending.
    """
    wanted = Wanted(suffixes)
    rejected: list[Rejection] = []
    num_hidden = num_repeated = num_absolute = 0

    def read() -> Iterator[Found]:
        nonlocal num_hidden, num_repeated, num_absolute
        for contents in _read_all(root, tars, wanted):
            rejected.extend(contents.rejected)
            num_repeated += contents.num_repeated
            num_absolute += contents.num_absolute
            for name in contents.members:
                if any(part.startswith(".") for part in name.split("/")):
                    num_hidden += wanted.is_video(name)
                elif wanted.takes(name):
                    found = _found(contents, name, doubtful=wanted.is_doubtful(name))
                    if found is None:
                        wanted.reject(name)
                    elif isinstance(found, Found):
                        yield found
                    else:
                        rejected.append(found)

    videos = gather(read())
    notes = []
    if num_repeated:
        notes.append(f"{num_repeated} names occur again in their tar file: the last one counts, as when it is unpacked")
    if num_absolute:
        notes.append(f"{num_absolute} names in tar files begin with /, which is left out, as when they are unpacked")
    return Listing(videos, tuple(rejected), num_hidden, wanted.others, notes=tuple(notes), root=root)


def _read_all(root: str, tars: Sequence[str], wanted: Wanted) -> Iterator[_Contents]:
    """The contents of each tar file; only a few are read ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:  # each waits for the store
        for first in range(0, len(tars), _AHEAD):
            yield from pool.map(lambda tar: _read(root, tar, wanted), tars[first : first + _AHEAD])


def is_compressed(tar: str) -> bool:
    """Whether a name is that of a compressed tar file."""
    return tar.lower().endswith(COMPRESSED_TARS)


def how_to_uncompress(tar: str, kind: str = "") -> str:
    """Says why a compressed tar file is not read, and what to do."""
    if not kind:
        endings = {"bz2": "bzip2", "xz": "xz", "txz": "xz", "zst": "zstd"}
        kind = next((kind for ending, kind in endings.items() if tar.lower().endswith(ending)), "gzip")
    return (
        f"it is compressed ({kind}), so a video in it can only be read after everything before it: "
        f"uncompress it once, for example with {_UNPACKERS[kind]}, and give the .tar file"
    )


def _found(contents: _Contents, name: str, *, doubtful: bool) -> Found | Rejection | None:
    """A video; None if its first bytes tell that it is none."""
    member, video_id = contents.members[name], f"{contents.tar}/{name}"
    for _ in range(len(contents.members)):
        if member.target is None:
            break
        member = contents.members.get(member.target) or _Member(
            problem=("dangling-link", f"it is a link to {member.target}, which is not in the tar file")
        )
    else:
        member = _Member(problem=("dangling-link", "it is a link that leads to itself"))
    if member.problem:
        return rejection(video_id, *member.problem)
    if doubtful and not is_mpeg(member.begin):
        return None
    place = TarMember(contents.tar, member.offset)
    return Found(video_id, member.num_bytes, label=contents.labels.get(_key(name)), member=place)


def _key(name: str) -> str:
    """What the files of one sample of WebDataset have in common: the path up to the first dot of the name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _read(root: str, tar: str, wanted: Wanted) -> _Contents:
    contents = _Contents(tar)
    if is_compressed(tar):
        contents.rejected.append(rejection(tar, "compressed-tar", how_to_uncompress(tar)))
        return contents
    end = 0
    try:
        filesystem, path = storage.filesystem(storage.join(root, tar))
        size = storage.patiently(lambda: filesystem.get_file_info(path).size) or 0
        file = _Window(RangedFile(storage.join(root, tar), num_bytes=size), size)
        begin = file.read(6)
        kind = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), None)
        if kind:
            contents.rejected.append(rejection(tar, "compressed-tar", how_to_uncompress(tar, kind)))
            return contents
        for info, after in _headers(file):
            _add(contents, info, file, size=size, wanted=wanted)
            end = after
        problem = _how_it_ends(file, end, size)
    except VideoError as error:
        problem = (error.reason, error.message)
    except Exception as error:  # a damaged header can make tarfile raise anything
        problem = ("damaged-tar", f"the header at byte {end} cannot be read ({error or type(error).__name__})")
    if problem:
        reason, message = problem
        kept = f"{message}; {len(contents.members)} files before that are taken" if contents.members else message
        contents.rejected.append(rejection(tar, reason, kept))
    return contents


def _headers(file: _Window) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member, and the byte after its content; ends quietly at a header that is wrong or not complete."""
    file.seek(0)
    archive = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
    end = -1
    while (info := archive.next()) is not None:
        if archive.offset <= end:
            raise tarfile.TarError("a size is negative")
        end = archive.offset
        yield info, end
        archive.members = []  # type: ignore[attr-defined]  # it keeps all of them


def _how_it_ends(file: _Window, end: int, size: int) -> tuple[str, str] | None:
    """Reason and message, if a tar file does not end as it should: with blocks of zeros, or after a member."""
    if end > size:
        return "truncated-tar", f"it is cut off: it has {size} bytes, and its last file ends at byte {end}"
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) % _BLOCK:
        return "truncated-tar", f"it is cut off in the header at byte {end}"
    if block.strip(b"\0"):
        return "damaged-tar", f"the header at byte {end} is damaged"
    return None


def _add(contents: _Contents, info: tarfile.TarInfo, file: _Window, *, size: int, wanted: Wanted) -> None:
    if info.isdir():
        return
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    name = "/".join(parts)
    full = f"{contents.tar}/{name}"
    if ".." in parts or not parts:
        if wanted.is_video(name):
            message = f"its name in the tar file is {info.name}, which leads out of it: pack it again"
            contents.rejected.append(rejection(full, "name-not-a-path", message))
        return
    try:
        name.encode()
    except UnicodeEncodeError:
        if wanted.is_video(name):
            message = "its name in the tar file is not valid UTF-8: pack it again"
            contents.rejected.append(rejection(full, "name-not-utf8", message))
        return
    contents.num_absolute += info.name.startswith("/") and wanted.is_video(name)
    contents.num_repeated += name in contents.members and wanted.is_video(name)
    contents.members.pop(name, None)
    contents.members[name] = member = _member(info, name, size)
    if member.problem or member.target is not None:
        return
    ending = os.path.splitext(name)[1].lower()
    if ending in (".cls", ".json") and member.num_bytes <= _MOST_LABEL_BYTES:
        label = _label(file.at(member.offset, member.num_bytes), ending)
        if label and (ending == ".cls" or _key(name) not in contents.labels):
            contents.labels[_key(name)] = label
    elif wanted.is_doubtful(name):
        contents.members[name] = dataclasses.replace(member, begin=file.at(member.offset, min(12, member.num_bytes)))


def _member(info: tarfile.TarInfo, name: str, size: int) -> _Member:
    if info.islnk():
        return _Member(target=posixpath.normpath(info.linkname).lstrip("/"))
    if info.issym():
        return _Member(target=posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname)))
    if info.issparse():
        return _Member(problem=("sparse", "it is stored with holes, so it is no range of the tar file: pack it again"))
    if not info.isreg():
        return _Member(problem=("not-a-file", "a FIFO or device"))
    # Of a member that is cut off there is a beginning, as of any file that is cut off.
    return _Member(info.offset_data, max(0, min(info.size, size - info.offset_data)))


def _label(content: bytes, ending: str) -> str | None:
    try:
        text = content.decode().strip()
        found = text if ending == ".cls" else json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, Mapping):
        found = next((found[name] for name in ("label", "cls") if name in found), None)
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) and str(found) else None


class _Window:
    """A file for tarfile, of which a window is in memory; past the end there are no bytes, whatever is asked for."""

    def __init__(self, file: RangedFile, size: int) -> None:
        self._file, self._size = file, size
        self._at, self._start, self._bytes = 0, 0, b""

    def seek(self, offset: int) -> None:
        if offset < 0:
            raise tarfile.TarError("a size is negative")
        self._at = offset

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        content = self.at(self._at, size)
        # tarfile seeks to the last byte of a member to learn whether the file is cut off, which _how_it_ends tells.
        if size == 1 and not content:
            content = b"\0"
        self._at += len(content)
        return content

    def at(self, offset: int, size: int) -> bytes:
        """The bytes there, without moving; fewer at the end of the file."""
        if size > _MOST_HEADER_BYTES:
            raise tarfile.TarError(f"it states {size} bytes")
        if not (self._start <= offset and offset + size <= self._start + len(self._bytes)):
            self._file.seek(offset)
            self._start, self._bytes = offset, self._file.read(max(size, _WINDOW_BYTES))
        return self._bytes[offset - self._start :][:size]
