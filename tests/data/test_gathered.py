"""Many videos are listed on disk: whatever their number, they are sorted, counted, and the same when read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoco.data import gathered
from vmoco.data.found import Found, Pictures, TarMember
from vmoco.data.gathered import gather
from vmoco.data.source import list_videos

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
maybe, seconds = st.none() | text, st.none() | st.floats(0, 1e9)
any_found = st.builds(Found, text, st.integers(0, 2**60), text, seconds, seconds, maybe, st.tuples(maybe, maybe, maybe))
members = st.none() | st.builds(TarMember, st.just("a.tar"), st.integers(0, 2**40))
pictures = st.none() | st.builds(Pictures, st.floats(1, 100), st.just("img_"), st.sampled_from(["jpeg", "png"]))


@given(st.lists(any_found, max_size=12, unique_by=lambda found: found.video_id), members, pictures)
def test_on_disk_as_in_memory(videos: list[Found], member: TarMember | None, own: Pictures | None) -> None:
    """All fields come back equal, in the order of the names, as often as they are read."""
    if videos:
        videos[0] = Found(videos[0].video_id, 3, member=member, pictures=own, group="g", source="s")
    in_memory = gather(videos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "IN_MEMORY", 0)
        patch.setattr(gathered, "_AT_ONCE", 2)
        on_disk = gather(iter(videos))
    assert in_memory == tuple(on_disk) == tuple(sorted(videos, key=lambda found: found.video_id))
    assert type(on_disk) is not tuple
    assert len(on_disk) == len(videos)
    assert [found.entry for found in on_disk] == [found.entry for found in in_memory]
    assert all(found in on_disk for found in videos)
    assert Found("another", 1) not in on_disk


def test_a_folder_is_listed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of files, some of which are rejected or hidden, has the same listing on disk."""
    for name in ("b/2.mp4", "a.mp4", "b/10.mkv", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    expected = list_videos(str(tmp_path))
    monkeypatch.setattr(gathered, "IN_MEMORY", 1)
    listing = list_videos(str(tmp_path))
    assert type(listing.videos) is not tuple
    assert tuple(listing.videos) == expected.videos
    assert (listing.rejected, listing.num_hidden, listing.others) == (
        expected.rejected,
        expected.num_hidden,
        expected.others,
    )
