"""An encoder sees the frames that are most like its training, and clips without colour if asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dataset import damage_clip, make_data_set, stored_clips
from tests.made import clips, encoder_of
from vmoco.evaluate.features import clip_features, embed_batch, mean_colour, window, without_colour


@pytest.mark.parametrize(
    ("fps", "frames", "stride", "seen"),
    [(25.0, 4, 1, [3, 4, 5, 6]), (12.5, 4, 2, [1, 3, 5, 7]), (8.0, 4, 3, [0, 3, 6, 9]), (50.0, 4, 1, [3, 4, 5, 6])],
)
def test_the_window_is_in_the_middle_at_the_encoders_rate(
    tmp_path: Path, fps: float, frames: int, stride: int, seen: list[int]
) -> None:
    """Ten stored frames at 25 per second, and encoders of several rates."""
    found = window(encoder_of(num_frames=frames, fps=fps), make_data_set(tmp_path))
    assert found.stride == stride
    assert list(found.numbers(10)) == seen
    assert ("sees 25 here" in found.note) == (fps == 50.0), "half of its rate is said, a tenth off is not"


def test_where_the_stride_does_not_fit_the_largest_is_taken_and_said(tmp_path: Path) -> None:
    """8 frames at 5 per second need 36 stored ones; with only ten, the encoder sees 8 frames, five times too fast."""
    found = window(encoder_of(num_frames=8, fps=5.0), make_data_set(tmp_path))
    assert found.stride == 1
    assert "trained at 5 frames per second and sees 25 here, because a stored clip has 10 frames" in found.note


def test_clips_that_are_too_short_are_refused(tmp_path: Path) -> None:
    """The message has the option of ingest that makes longer clips."""
    with pytest.raises(ValueError, match=r"clips of 10 frames, and this encoder was trained on 16: .*--num-frames 16"):
        window(encoder_of(num_frames=16), make_data_set(tmp_path))


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_features_are_those_of_the_stored_frames(tmp_path: Path, encoding: str) -> None:
    """Row by row, with any batch size: they equal the encoder on the middle frames of the shard."""
    manifest = make_data_set(tmp_path, num_videos=3, encoding=encoding)  # type: ignore[arg-type]
    encoder = encoder_of()
    found = clip_features(encoder, manifest, manifest.table, batch_size=4)
    for at, frames in enumerate(stored_clips(manifest)):
        torch.testing.assert_close(torch.from_numpy(found[at : at + 1]), encoder.embed(frames[1:9]))


def test_a_damaged_clip_has_no_features(tmp_path: Path) -> None:
    """The message names its shard and what to do."""
    manifest = make_data_set(tmp_path)
    with pytest.raises(ValueError, match=damage_clip(manifest, 7)):
        clip_features(encoder_of(), manifest, manifest.table)


def test_pictures_of_different_shapes_share_a_batch() -> None:
    """Each clip is cropped and scaled separately; its features equal those of the clip alone."""
    encoder = encoder_of()
    mixed = [clips(1, height=height, width=width)[0].numpy() for height, width in ((40, 48), (60, 33), (32, 32))]
    expected = torch.cat([encoder.embed(frames) for frames in mixed])
    torch.testing.assert_close(embed_batch(encoder, mixed), expected)


def coloured(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 140, (4, 12, 16, 3), dtype=np.uint8)


def test_a_tint_a_lamp_and_a_filter_are_gone() -> None:
    """Brighter, of more contrast or grey from the start: after rounding, the same clip."""
    grey = np.repeat(coloured(0)[..., :1], 3, axis=-1)
    expected = without_colour(grey).astype(int)
    for changed in (grey + 40, (grey * 1.5).astype(np.uint8)):
        assert np.abs(without_colour(changed).astype(int) - expected).max() <= 2
    assert np.ptp(without_colour(coloured(1)), axis=-1).max() == 0, "all three channels are one"


def test_all_clips_get_the_same_mean_and_deviation() -> None:
    """Over the complete clip and not per frame, so a brighter frame stays brighter."""
    frames = coloured(2)
    frames[0] += 20
    flat = without_colour(frames)[..., 0].astype(float)
    assert abs(flat.mean() - 100) < 1
    assert abs(flat.std() - 55) < 2
    assert flat[0].mean() > flat[1:].mean() + 10


def test_a_clip_of_one_colour_is_no_division_by_zero() -> None:
    """Only the common mean is left of it."""
    assert (without_colour(np.full((2, 4, 4, 3), 7, np.uint8)) == 100).all()


def test_mean_colour_is_the_mean() -> None:
    """Equals the mean in float64."""
    np.testing.assert_allclose(
        mean_colour(coloured(3)), coloured(3).astype(float).reshape(-1, 3).mean(axis=0), rtol=1e-6
    )
