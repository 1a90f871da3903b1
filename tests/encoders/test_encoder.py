"""An encoder takes a path, an array or a tensor, and prepares frames itself; it refuses other input with a message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_pixels import hdr_video
from tests.data.videos import Kept, corrupt, images, truncate, write_video
from tests.made import clips, encoder_of
from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD
from vmoco.data.clips import ClipPlan
from vmoco.data.video import cut_clips
from vmoco.encoders.encoder import Encoder, Preprocessing


def test_preprocessing_is_a_centre_crop_and_kinetics_normalisation() -> None:
    """Without scaling, equals plain numpy: the middle square of each frame, (pixel / 255 - mean) / std."""
    frames = clips(height=32)  # as high as the encoder wants; 48 wide
    found = encoder_of().preprocess(frames).numpy()
    square = frames.numpy()[:, :, :, 8:40].astype(np.float64) / 255
    expected = ((square - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)).transpose(0, 4, 1, 2, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_encoder_may_normalise_each_clip_by_itself() -> None:
    """Equals plain numpy, clip by clip. Old cards, without this option, use the values of Kinetics."""
    frames, kinetics = clips(height=32), encoder_of()
    values = kinetics.preprocessing.to_json()
    encoder = Encoder(kinetics.backbone, Preprocessing.from_json(values | {"standardise": True}), {}).eval()
    square = frames.numpy()[:, :, :, 8:40].astype(np.float64)
    for clip, found in zip(square, encoder.preprocess(frames).numpy(), strict=True):
        expected = (clip - clip.mean()) / clip.std()
        np.testing.assert_allclose(found, expected.transpose(3, 0, 1, 2), atol=1e-4)
    del values["standardise"]
    assert Preprocessing.from_json(values) == kinetics.preprocessing


def test_a_tensor_an_array_and_one_clip_give_the_same() -> None:
    """So do a read-only array, one with negative strides, and one clip without the first dimension."""
    encoder = encoder_of()
    expected = encoder.embed(clips())
    assert expected.shape == (3, encoder.feature_dim)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    locked = clips().numpy()
    locked.flags.writeable = False
    for source in (clips().numpy(), locked, np.ascontiguousarray(locked[..., ::-1])[..., ::-1]):
        assert torch.equal(encoder.embed(source), expected)
    torch.testing.assert_close(encoder.embed(clips()[1]), expected[1:2])
    torch.testing.assert_close(encoder.embed(clips().numpy()[1]), expected[1:2])


@pytest.mark.parametrize(
    ("name", "fps", "frames", "ingest_fps", "num_clips"),
    [
        ("as-trained.mp4", 25, 70, None, 8),
        ("fast.mp4", 50, 70, 25.0, 4),
        ("odd.mkv", 30, 70, 25.0, 7),
        ("slow.avi", 10, 70, 25.0, 21),
    ],
)
def test_a_video_gives_its_clips_at_the_encoders_rate(
    tmp_path: Path, name: str, fps: int, frames: int, ingest_fps: float | None, num_clips: int
) -> None:
    """The pixels of a path are those of an ingest at the encoder's rate, 25, by time stamps and not by a stride."""
    codec = "mpeg4" if name == "slow.avi" else "libx264"
    path = write_video(tmp_path / name, images(frames), fps=fps, codec=codec)
    encoder = encoder_of()
    kept = Kept()
    cut_clips(str(path), ClipPlan(8, fps=ingest_fps, max_clips=32), height=32, width=32, sink=kept)
    assert len(kept.clips) == num_clips
    clips_of_ingest = np.stack(kept.clips)
    np.testing.assert_array_equal(encoder.clips(path).numpy(), clips_of_ingest)
    assert torch.equal(encoder.embed(path), encoder.embed(clips_of_ingest))
    assert torch.equal(encoder.embed(str(path)), encoder.embed(clips_of_ingest))


def test_short_videos_are_treated_as_by_ingest(tmp_path: Path) -> None:
    """Rejected unless they shall loop, and then the pixels are those of ingest; the same for rotated and HDR ones."""
    encoder = encoder_of()
    short = write_video(tmp_path / "short.mp4", images(5))
    turned = write_video(tmp_path / "turned.mp4", images(20), rotation=90, flips=(True, False))
    hdr = hdr_video(tmp_path / "hdr.mp4", transfer=18, primaries=9)
    for path in (short, turned, hdr):
        kept = Kept()
        cut_clips(str(path), ClipPlan(8, short="loop"), height=32, width=32, sink=kept)
        np.testing.assert_array_equal(encoder.clips(path, short_videos="loop").numpy(), np.stack(kept.clips))
    with pytest.raises(ValueError, match="too-few-frames: 5 frames"):
        encoder.clips(short)
    features = encoder.embed(short, short_videos="loop")
    assert torch.equal(features, encoder.embed(encoder.clips(short, short_videos="loop")))


def test_a_damaged_video_gives_its_clips_without_damage(tmp_path: Path) -> None:
    """The same clips as ingest keeps, with a warning that names the seconds."""
    path = write_video(tmp_path / "a.mp4", images(100), options={"g": "10", "sc_threshold": "0"})
    encoder = encoder_of()
    whole = encoder.clips(path)
    corrupt(path, end=0.45)
    with pytest.warns(UserWarning, match=r"a.mp4 gives its clips without damage: \d+\.\d % is lost \(seconds "):
        clips = encoder.clips(path)
    assert 0 < len(clips) < len(whole)
    assert all((whole == clip).flatten(1).all(1).any() for clip in clips)


def test_a_video_that_gives_no_clips_is_said(tmp_path: Path) -> None:
    """Missing, cut off, and too short."""
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"there is no video file .*none.mp4"):
        encoder.embed(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match=r"gives no clips \(clip: too-few-frames: 5 frames"):
        encoder.embed(write_video(tmp_path / "short.mp4", images(5)))
    with pytest.raises(ValueError, match="gives no clips"):
        encoder.embed(truncate(write_video(tmp_path / "cut.mp4", images(40)), 0.5))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 8, 40, 48, 3),
        torch.zeros(40, 48, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 40, 48, dtype=torch.uint8),
        torch.zeros(0, 8, 40, 48, 3, dtype=torch.uint8),
        np.zeros((8, 40, 48, 3)),
    ],
    ids=["float", "one frame", "channels first", "no clip", "float array"],
)
def test_other_frames_are_refused(wrong: torch.Tensor) -> None:
    """The message names the shape that came and the one that is needed."""
    with pytest.raises(ValueError, match=r"frames are .*(float|uint8).*: .*uint8"):
        encoder_of().embed(wrong)


def test_what_is_no_frames_at_all_is_refused() -> None:
    """The message names the type."""
    with pytest.raises(ValueError, match="frames are list: give a path, or uint8 frames"):
        encoder_of().embed([1, 2])  # type: ignore[arg-type]


def test_s3d_says_how_many_frames_it_needs() -> None:
    """A clear message comes before an error in the middle of the network."""
    with pytest.raises(ValueError, match="clips have 4 frames: give at least 5, which an s3d needs"):
        encoder_of("s3d", size=32).embed(clips(num_frames=4))
