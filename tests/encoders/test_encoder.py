"""An encoder takes a path, an array or a tensor, and prepares frames itself; it refuses other input with a message."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_pixels import hdr_video
from tests.data.videos import Kept, corrupt, images, truncate, write_video
from tests.decoding import InProcess
from tests.made import clips, encoder_of
from tests.store import BUCKET, Store
from vmoco import storage
from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD
from vmoco.data.clips import ClipPlan
from vmoco.data.video import cut_clips, cut_whole
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


def test_of_a_long_video_only_the_clips_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `embed` and `cut_video`; clips and features are those of decoding every frame."""
    coding = {"g": "4", "keyint_min": "4", "bf": "2", "sc_threshold": "0"}
    path = write_video(tmp_path / "a.mp4", images(900), options=coding)
    encoder, decoder, expected = encoder_of(), InProcess(), Kept()
    cut_whole(str(path), ClipPlan(8, max_clips=32), height=32, width=32, sink=expected)
    monkeypatch.setattr("vmoco.data.decoder.Decoder", lambda: decoder)
    count = decoder.count_frames(monkeypatch)
    assert torch.equal(encoder.embed(path), encoder.embed(np.stack(expected.clips)))
    assert 32 * 8 <= count() <= 32 * (8 + 3 + 2)
    few, kept = encoder.cut_video(str(path), decoder=decoder, max_clips=3), Kept()
    assert 3 * 8 <= count() <= 3 * (8 + 3 + 2)
    whole = cut_whole(str(path), ClipPlan(8, max_clips=3), height=32, width=32, sink=kept)
    np.testing.assert_array_equal(few.frames, np.stack(kept.clips))
    assert (few.start_times, few.start_seconds) == (whole.start_times, whole.start_seconds)
    assert count() == 900


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
    with pytest.raises(
        ValueError, match=r"is a folder: give a video file or .*jobs/ingest.py --layout frames --fps first"
    ):
        encoder.embed(str(tmp_path))
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
    """The message names the type, and its place in a list."""
    with pytest.raises(ValueError, match=r"^frames are int: give a path, or uint8 frames"):
        encoder_of().embed(1)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"^source 1: frames are NoneType: give a path, or uint8 frames"):
        encoder_of().embed([clips(), None])  # type: ignore[list-item]


def test_s3d_says_how_many_frames_it_needs() -> None:
    """A clear message comes before an error in the middle of the network."""
    with pytest.raises(ValueError, match="clips have 4 frames: give at least 5, which an s3d needs"):
        encoder_of("s3d", size=32).embed(clips(num_frames=4))


def test_a_list_gives_a_tensor_for_each_source(tmp_path: Path) -> None:
    """In their order, with the features of each alone, whatever shares a batch; a line says how far it is."""
    encoder = encoder_of()
    path = write_video(tmp_path / "a.mp4", images(40))
    sources = [clips(3), path, clips(1, num_frames=6), str(path), clips(5).numpy()]
    lines: list[str] = []
    found = encoder.embed(sources, batch_size=4, progress=lines.append)
    assert [len(features) for features in found] == [3, 5, 1, 5, 5]
    for features, source in zip(found, sources, strict=True):
        torch.testing.assert_close(features, encoder.embed(source))
    assert lines[-1].startswith("embed  read 5/5 sources  clips 19  ")
    assert encoder.embed([]) == []
    with pytest.raises(ValueError, match=r"^source 1: there is no video file .*none.mp4"):
        encoder.embed((path, tmp_path / "none.mp4"))
    with pytest.raises(ValueError, match="batch_size is 0: 1 or more is needed"):
        encoder.embed(path, batch_size=0)


def test_a_uri_is_a_video_too(tmp_path: Path, store: Store) -> None:
    """In a store and as file://; a missing object is said."""
    encoder = encoder_of()
    path = write_video(tmp_path / "a b.mp4", images(40))
    expected = encoder.embed(path)
    assert torch.equal(encoder.embed(f"file://{path}"), expected)
    storage.write_atomic(f"s3://{BUCKET}/videos/a b.mp4", path.read_bytes())
    assert torch.equal(encoder.embed(f"s3://{BUCKET}/videos/a b.mp4"), expected)
    with pytest.raises(ValueError, match=r"there is no video file s3://.*none\.mp4"):
        encoder.embed(f"s3://{BUCKET}/videos/none.mp4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["r3d_nano", "r2plus1d_18", "s3d", "swin3d_nano", "mvit_v2_s"])
def test_half_precision_gives_nearly_the_same_features(name: str, dtype: torch.dtype) -> None:
    """As weights or under autocast, features are float32 unit rows; pixels are normalised in float32."""
    encoder = encoder_of(name)
    expected = encoder.embed(clips())
    half = copy.deepcopy(encoder).to(dtype)
    assert (half.dtype, half.mean.dtype, encoder.dtype) == (dtype, torch.float32, torch.float32)
    assert half.weights_hash() != encoder.weights_hash()
    found = half.embed(clips())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert half(clips()).dtype == dtype
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(encoder.embed(clips()), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(half.float().embed(clips()), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["r3d_nano", "r2plus1d_nano", "r3d_18", "s3d", "swin3d_nano"])
def test_feature_maps_are_what_is_pooled(name: str) -> None:
    """Their mean over time and place is the feature; a change at one place of the clip moves the maps there most."""
    encoder = encoder_of(name, size=64, num_frames=16)
    frames = clips(1, num_frames=16, height=64, width=64)
    maps = encoder.feature_maps(frames)
    assert maps.dtype == torch.float32
    assert maps.shape[:2] == (1, encoder.feature_dim)
    pooled = encoder.backbone.trunk.avgpool(maps) if name == "s3d" else maps  # with windows that overlap
    torch.testing.assert_close(pooled.mean(dim=(2, 3, 4)), encoder(frames))
    changed = frames.clone()
    changed[:, :, 48:, 48:] = 255
    moved = (encoder.feature_maps(changed) - maps).abs().sum(dim=(0, 1, 2))
    assert moved[-1, -1] == moved.max() > moved[0, 0]


def test_feature_maps_of_mvit_have_places_and_the_feature_is_a_token_of_its_own() -> None:
    """Tokens by time and place, in order: a change in one corner at the end moves those there most."""
    encoder = encoder_of("mvit_v2_s", size=64, num_frames=16)
    frames = clips(1, num_frames=16, height=64, width=64)
    maps = encoder.feature_maps(frames)
    assert maps.shape == (1, encoder.feature_dim, 8, 2, 2)
    assert not torch.allclose(maps.mean(dim=(2, 3, 4)), encoder(frames), atol=1e-3)
    changed = frames.clone()
    changed[:, 12:, 48:, 48:] = 255
    moved = (encoder.feature_maps(changed) - maps).abs().sum(dim=(0, 1))
    assert moved[6:, 1, 1].min() > moved[:6].max()
    assert moved[6:].flatten(1).argmax(dim=1).tolist() == [3, 3]


def test_other_lengths_are_said_where_positions_are_learned() -> None:
    """mvit_v2_s warns with both lengths and gives features; the others take any length without a word."""
    encoder = encoder_of("mvit_v2_s")
    with pytest.warns(UserWarning, match=r"clips have 6 frames, and this mvit_v2_s was trained on 8: its positions in"):
        found = encoder.embed(clips(num_frames=6))
    assert found.shape == (3, 768)
    encoder.embed(clips())
    encoder_of("swin3d_nano").embed(clips(num_frames=6))


@pytest.mark.parametrize("name", ["r3d_nano", "swin3d_nano", pytest.param("mvit_v2_s", marks=pytest.mark.slow)])
def test_a_copy_a_pickle_and_compiled_or_exported_encoders_are_the_same(tmp_path: Path, name: str) -> None:
    """Also on a device without memory and back, as large models are loaded."""
    encoder = encoder_of(name)
    expected = encoder(clips())
    for same in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(same(clips()), expected)
        assert same.weights_hash() == encoder.weights_hash()
    whole = torch.compile(encoder, backend="eager", fullgraph=True)  # without a break, and without a C++ compiler
    assert torch.equal(whole(clips()), expected)
    program = torch.export.export(encoder, (clips(),)).module()
    assert torch.equal(program(clips()), expected)
    empty = copy.deepcopy(encoder).to("meta").to_empty(device="cpu")
    empty.load_state_dict(encoder.state_dict())
    assert torch.equal(empty(clips()), expected)
