"""A window slides over a video of any length: the pixels of ingest, regular times, and only what is whole."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.data.test_video import joined
from tests.data.videos import Kept, corrupt, images, number_of, write_video
from tests.made import encoder_of
from tests.store import BUCKET, Store
from vmoco import storage
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder, StoredClips
from vmoco.data.probing import probe
from vmoco.data.video import cut_clips
from vmoco.encoders.dense import SlidingWindow, slide
from vmoco.encoders.encoder import Encoder

Frames = npt.NDArray[np.uint8]


def slid(path: Path, encoder: Encoder, *, batch_size: int = 4, **options: Any) -> tuple[StoredClips, list[Frames]]:
    """The batches of clips of a window that slides over a video."""
    defaults: dict[str, Any] = {"every_seconds": 0.1, "clip_seconds": None, "short_videos": "reject"}
    window, decoder = SlidingWindow.of(encoder, **defaults | options), Decoder()
    try:
        cut, batches, _ = slide(
            encoder, str(path), window, lambda _, frames: frames, decoder=decoder, batch_size=batch_size, seconds=60
        )
        clip_bytes = window.num_frames * encoder.preprocessing.size**2 * 3
        assert os.fstat(decoder.scratch.fileno()).st_size <= batch_size * clip_bytes, "the disk holds one batch"
        return cut, batches
    finally:
        decoder.close()


@pytest.mark.parametrize(
    ("name", "fps", "ingest_fps"),
    [("as-trained.mp4", 25, None), ("fast.mp4", 50, 25.0), ("odd.mkv", 30, 25.0), ("slow.avi", 10, 25.0)],
)
def test_clips_are_slices_of_what_ingest_takes(tmp_path: Path, name: str, fps: int, ingest_fps: float | None) -> None:
    """At the encoder's rate, 25, a clip begins every 2.5 frames of an ingest, and has the pixels of that ingest."""
    codec = "mpeg4" if name == "slow.avi" else "libx264"
    path = write_video(tmp_path / name, images(70), fps=fps, codec=codec)
    encoder, kept = encoder_of(), Kept()
    taken = cut_clips(str(path), ClipPlan(1, fps=ingest_fps), height=32, width=32, sink=kept)
    pixels = np.concatenate(kept.clips)
    starts = [number * 5 // 2 for number in range(len(pixels)) if number * 5 // 2 + 8 <= len(pixels)]
    _, batches = slid(path, encoder)
    np.testing.assert_array_equal(np.concatenate(batches), [pixels[start : start + 8] for start in starts])
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    dense = encoder.embed_dense(path, every_seconds=0.1)
    torch.testing.assert_close(dense.features, encoder.embed(np.concatenate(batches)))
    np.testing.assert_allclose(dense.start_seconds, taken.start_seconds[0] + np.arange(len(starts)) * 0.1)
    assert dense.clip_seconds == pytest.approx(8 / 25, rel=1e-3)
    assert not dense.features.requires_grad


def test_length_and_step_of_a_clip(tmp_path: Path) -> None:
    """Seconds become frames of the encoder's rate; the step is half a clip if it is left out; long clips share less."""
    path, encoder = write_video(tmp_path / "a.mp4", images(60)), encoder_of()
    for clip_seconds, frames, step in ((None, 8, 4), (0.48, 12, 6), (0.04, 1, 1)):
        found = encoder.embed_dense(path, clip_seconds=clip_seconds, every_seconds=0.04 if frames == 1 else None)
        starts = np.arange(0, 60 - frames + 1, step)
        np.testing.assert_allclose(found.start_seconds, starts / 25, atol=1e-9)
        assert found.clip_seconds == pytest.approx(frames / 25)
        assert found.features.shape == (len(starts), encoder.feature_dim)
    _, batches = slid(path, encoder, clip_seconds=0.64)
    assert {batch.shape[1] for batch in batches} == {16}
    assert max(map(len, batches)) == 2, "as many frames as in a batch of clips of 8"


def test_damage_leaves_gaps(tmp_path: Path) -> None:
    """Clips that touch the damage are missing, with a warning in the caller's line; the others are those of before.

    The damage is found after batches were handed over, so decoding starts again, and these do not count twice.
    """
    path = write_video(tmp_path / "a.mp4", images(150), options={"g": "10", "sc_threshold": "0"})
    encoder = encoder_of()
    whole = encoder.embed_dense(path, every_seconds=0.1)
    corrupt(path, start=0.6, end=0.65)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense = encoder.embed_dense(path, every_seconds=0.1, batch_size=2)
    said = [each for each in caught if "a.mp4 gives its clips without damage: " in str(each.message)]
    assert [each.filename for each in said] == [__file__], [str(each.message) for each in caught]
    places = [whole.start_seconds.tolist().index(start) for start in dense.start_seconds.tolist()]
    assert 20 < len(places) < len(whole.start_seconds)
    assert places[:20] == list(range(20))
    assert max(np.diff(places)) > 3
    torch.testing.assert_close(dense.features, whole.features[places])
    firsts: list[int] = []
    decoder = Decoder()
    window = SlidingWindow.of(encoder, every_seconds=0.1, clip_seconds=None, short_videos="reject")
    slide(encoder, str(path), window, lambda first, _: firsts.append(first), decoder=decoder, batch_size=2, seconds=60)
    decoder.close()
    assert firsts.count(0) == 2, "the test needs damage that is found late"


def test_no_clip_holds_frames_of_two_recordings(tmp_path: Path) -> None:
    """Frames of a clip follow each other; the times go on after the seam as if there were none."""
    path = joined(tmp_path / "a.ts", 40, 60)
    cut, batches = slid(path, encoder_of(), every_seconds=0.08)
    pixels = np.pad(np.concatenate(batches), ((0, 0), (0, 0), (0, 0), (5, 6), (0, 0)))  # 32 x 43, as before the crop
    numbers = [[number_of(frame) for frame in clip] for clip in pixels]
    assert all(np.diff(clip).tolist() == [1] * 7 for clip in numbers)
    firsts, whole = [clip[0] for clip in numbers], min(probe(str(path)).doubtful)
    assert 36 <= whole <= 40
    assert firsts == [start for start in range(0, 93, 2) if start + 8 <= whole or start >= 40]
    first = cut.start_seconds[0]
    np.testing.assert_allclose(np.array(cut.start_seconds) - first, np.array(firsts) / 25, atol=1e-6)


def test_a_list_and_a_uri(tmp_path: Path, store: Store) -> None:
    """In order, with the features of each alone; a line tells how far it is, also in the middle of a video."""
    encoder = encoder_of()
    paths = [write_video(tmp_path / f"{name}.mp4", images(20 + 20 * name)) for name in range(2)]
    storage.write_atomic(f"s3://{BUCKET}/videos/0.mp4", paths[0].read_bytes())
    lines: list[str] = []
    found = encoder.embed_dense(
        [f"s3://{BUCKET}/videos/0.mp4", str(paths[1])], every_seconds=0.2, progress=lines.append
    )
    for dense, path in zip(found, paths, strict=True):
        alone = encoder.embed_dense(path, every_seconds=0.2)
        torch.testing.assert_close(dense.features, alone.features)
        np.testing.assert_array_equal(dense.start_seconds, alone.start_seconds)
    assert lines[-1].startswith(f"embed  read 2/2 sources  clips {sum(len(dense.features) for dense in found)}  ")
    assert encoder.embed_dense([], every_seconds=1) == []


def test_what_is_refused(tmp_path: Path) -> None:
    """The message names the value, what is allowed, and in a list the place."""
    encoder, path = encoder_of(), write_video(tmp_path / "a.mp4", images(20))
    with pytest.raises(ValueError, match=r"^every_seconds 0.02 is less than a frame .* 25 frames per second: .* 0.04$"):
        encoder.embed_dense(path, every_seconds=0.02)
    with pytest.raises(ValueError, match=r"^clip_seconds 0.01 is 0 frames at .*: give at least 0.04$"):
        encoder.embed_dense(path, clip_seconds=0.01)
    with pytest.raises(ValueError, match=r"^clip_seconds 0.1 is 2 frames at .*: give at least 0.2$"):
        encoder_of("s3d").embed_dense(path, clip_seconds=0.1)
    with pytest.raises(ValueError, match=r"^source 1: Tensor is not a path or URI of a video: .* embed takes frames"):
        encoder.embed_dense([path, torch.zeros(1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^source 1: there is no video file .*none.mp4"):
        encoder.embed_dense([path, tmp_path / "none.mp4"])
    with pytest.raises(ValueError, match=r"^video .*a.mp4 gives no clips \(clip: too-few-frames: 20 frames"):
        encoder.embed_dense(path, clip_seconds=2)
    looped = encoder.embed_dense(path, clip_seconds=2, short_videos="loop")
    assert looped.start_seconds.tolist() == [0.0]
    with pytest.raises(ValueError, match="batch_size is 0"):
        encoder.embed_dense(path, batch_size=0)


def test_an_error_in_the_network_leaves_no_decoder_waiting(tmp_path: Path) -> None:
    """The decoder that was to give the next batch is ended; the next video is decoded as ever."""
    path, encoder, decoder = write_video(tmp_path / "a.mp4", images(60)), encoder_of(), Decoder()
    window = SlidingWindow.of(encoder, every_seconds=0.1, clip_seconds=None, short_videos="reject")

    def broken(first: int, frames: Frames) -> int:
        if first:
            raise ZeroDivisionError
        return len(frames)

    options: dict[str, Any] = {"decoder": decoder, "batch_size": 2, "seconds": 60}
    with pytest.raises(ZeroDivisionError):
        slide(encoder, str(path), window, broken, **options)
    assert decoder._process is None
    cut, batches, _ = slide(encoder, str(path), window, lambda _, frames: len(frames), **options)
    assert sum(batches) == len(cut.start_seconds) == 22
    decoder.close()
