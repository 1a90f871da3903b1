"""The motion probes are high for an encoder that sees motion, and at chance for one that sees a single frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.dataset import make_data_set, stored_clips, write_data_set
from tests.made import encoder_of
from vmoco.cluster.local import LocalCluster
from vmoco.data.manifest import Manifest
from vmoco.data.shard import Clip
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.evaluate import evaluate as evaluation
from vmoco.evaluate.features import Window, embed_views, window
from vmoco.evaluate.motion import CLIPS as CLIPS_OF_A_PART
from vmoco.evaluate.motion import (
    COLOUR,
    ENCODER,
    STILL,
    ByView,
    Motion,
    colour_features,
    make_views,
    measure_motion,
    plan_motion,
    read_colours,
    split_views,
    still_features,
)
from vmoco.evaluate.motion_probes import probe_encoder
from vmoco.evaluate.score import score_encoder
from vmoco.job_settings import EvaluateSettings
from vmoco.model.backbone import Backbone

VIDEOS, CLIPS, FRAMES, SIDE = 60, 4, 16, 32


class _Flow(nn.Module):
    """Sees motion: which way brightness moves, how much frames differ, and where in the clip they differ most."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        frames = clips.mean(dim=1)
        change = frames.diff(dim=1)
        between = (frames[:, 1:] + frames[:, :-1]) / 2
        across, down = torch.gradient(between, dim=(3, 2))
        # Over all changes, so that the speed does not decide how much the direction counts.
        much = (change**2).mean(dim=(1, 2, 3))[:, None]
        ways = torch.stack([(change * slope).mean(dim=(1, 2, 3)) for slope in (across, down)], dim=1)
        profile = change.abs().mean(dim=(2, 3))
        middle = profile[:, [profile.shape[1] // 2]]
        return torch.cat(
            [20 * ways / much.clamp(min=1e-6), 5 * profile.mean(dim=1, keepdim=True), middle - profile[:, [0]]], dim=1
        )


class _MiddleFrame(nn.Module):
    """Sees the middle frame, at 4x4 pixels."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(clips.mean(dim=1)[:, clips.shape[2] // 2], 4).flatten(1)


def encoder(trunk: nn.Module, width: int) -> Encoder:
    return Encoder(Backbone(trunk, width), Preprocessing(8, 25.0, SIDE), {"backbone": "r3d_nano"}).eval()


def flow() -> Encoder:
    return encoder(_Flow(), 4)


def middle_frame() -> Encoder:
    return encoder(_MiddleFrame(), 16)


def footage(folder: Path, *, pixels: float = 1.5, fade: float = 0.0, videos: int = VIDEOS) -> Manifest:
    """A square that moves in one direction through a video, over still noise; each clip starts elsewhere.

    Args:
        folder: of the data set.
        pixels: how far it moves from frame to frame.
        fade: how much brighter each frame is than the previous one.
        videos: number of videos; half are held out.
    """
    clips = []
    for video in range(videos):
        random = np.random.default_rng(video)
        angle = random.uniform(0, 2 * np.pi)
        for place in range(CLIPS):
            ground = random.integers(40, 90, (SIDE, SIDE, 1))
            frames = np.repeat(np.repeat(ground[None], FRAMES, axis=0), 3, axis=-1).astype(np.float64)
            start = random.uniform(0, SIDE, 2)
            for frame in range(FRAMES):
                left, top = (start + pixels * frame * np.array([np.cos(angle), np.sin(angle)])).round().astype(int)
                rows, columns = (np.arange(first, first + 9) % SIDE for first in (top, left))
                frames[frame][np.ix_(rows, columns)] = 220
                frames[frame] += fade * frame
            name, held_out = f"v{video:03d}", video % 2 == 0
            clip_id = f"{video:08d}{place:08d}"
            clips.append(Clip(clip_id, name, place * 1.0, 25.0, held_out, frames.clip(0, 255).astype(np.uint8)))
    return write_data_set(folder, clips)


def by_view(encoder: Encoder, manifest: Manifest) -> ByView:
    rows, views = plan_motion(manifest).rows, make_views(window(encoder, manifest), FRAMES)
    stored = dict(zip(manifest.table["clip_id"].to_pylist(), stored_clips(manifest), strict=True))
    clips = [stored[clip] for clip in rows["clip_id"].to_pylist()]
    features = embed_views(encoder, clips, list(views.numbers.values()), colour=False)
    return split_views(features.numpy(), list(views.numbers))


def measured(encoder: Encoder, manifest: Manifest) -> dict[str, Motion]:
    chosen, views = plan_motion(manifest), make_views(window(encoder, manifest), FRAMES)
    features = by_view(encoder, manifest)
    colours, _ = read_colours(manifest, chosen.rows)
    sources = {ENCODER: features, STILL: still_features(features), COLOUR: colour_features(colours, views)}
    found = measure_motion(sources, chosen, views, clip_seconds=FRAMES / 25)
    return {each.probe: each for each in found}


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return footage(tmp_path_factory.mktemp("moving"))


def test_who_sees_motion_scores_high(moving: Manifest) -> None:
    """Arrow, speed and order are high; a single frame of the same clips reveals none of them to this encoder."""
    found = measured(flow(), moving)
    assert list(found) == ["arrow", "speed", "order"]
    for probe, each in found.items():
        assert each.by[ENCODER].low > each.chance + 0.25, probe
        assert each.by[STILL].low <= each.chance <= each.by[STILL].high, probe
        assert each.num_videos == VIDEOS / 2


def test_who_sees_a_single_frame_is_at_chance(moving: Manifest) -> None:
    """Such an encoder is at chance in all three probes; at speed exactly, because the middle frame is the same."""
    found = measured(middle_frame(), moving)
    for probe, each in found.items():
        assert each.by[ENCODER].low <= each.chance <= each.by[ENCODER].high, probe
        assert each.by[ENCODER].high < each.chance + 0.15, probe
    assert found["speed"].by[ENCODER].value == pytest.approx(1 / 3)


def test_a_static_scene_has_nothing_to_tell(tmp_path: Path) -> None:
    """If nothing moves, an encoder that sees motion is exactly at chance, and repeated frames are reported."""
    manifest = footage(tmp_path, pixels=0)
    for each in measured(flow(), manifest).values():
        assert each.by[ENCODER].value == pytest.approx(each.chance)
    _, note = read_colours(manifest, plan_motion(manifest).rows)
    assert note.startswith("100% of the clips repeat a frame")


def test_a_fade_that_gives_order_away_shows_in_the_baselines(tmp_path: Path) -> None:
    """Frames that grow brighter reveal the order of halves: colours alone, and one frame alone, find it."""
    found = measured(middle_frame(), footage(tmp_path, fade=3))
    assert found["order"].by[COLOUR].low > 0.9
    assert found["order"].by[STILL].low > 0.6


def test_colours_are_those_of_the_frames_and_their_changes(moving: Manifest) -> None:
    """Equal to those of the stored pixels."""
    chosen, views = plan_motion(moving), make_views(Window(8, 1), FRAMES)
    colours, note = read_colours(moving, chosen.rows)
    assert note == ""
    found = colour_features(colours, views)["reversed"]
    place = moving.table["clip_id"].to_pylist().index(chosen.rows["clip_id"][3].as_py())
    means = stored_clips(moving)[place][list(views.numbers["reversed"])].astype(float).mean(axis=(1, 2))
    expected = np.concatenate([means, np.abs(np.diff(means, axis=0))])
    np.testing.assert_allclose(found[3], expected.ravel(), atol=1e-3)


def test_views_show_the_frames_that_they_say() -> None:
    """Of 16 stored frames: a window of 8, and four frames at each speed with the same middle frame."""
    views = make_views(Window(8, 1), FRAMES)
    assert views.numbers["seen"] == (4, 5, 6, 7, 8, 9, 10, 11)
    assert views.numbers["reversed"] == (11, 10, 9, 8, 7, 6, 5, 4)
    assert views.numbers["swapped"] == (8, 9, 10, 11, 4, 5, 6, 7)
    assert views.numbers["speed 1"] == (7, 8, 9, 10)
    assert views.numbers["speed 2"] == (5, 7, 9, 11)
    assert views.numbers["speed 4"] == (1, 5, 9, 13)
    assert views.numbers["still swapped"] == (4,) * 8
    assert views.moving == ["seen", "reversed", "swapped", "speed 1", "speed 2", "speed 4"]
    assert "shows 4 of the 8 frames" in views.note
    assert "--num-frames 29" in views.note
    assert make_views(Window(8, 1), 29).note == ""


@pytest.mark.parametrize("stored", range(5, 40))
@pytest.mark.parametrize("seen", [2, 5, 8])
def test_views_stay_within_the_clip(stored: int, seen: int) -> None:
    """For all lengths, the views of a probe show equally many frames; too short clips have no speed, with a note."""
    if seen > stored:
        return
    views = make_views(Window(seen, 1), stored)
    shown = views.numbers
    assert {number for numbers in shown.values() for number in numbers} <= set(range(stored))
    assert sorted(shown["swapped"]) == sorted(shown["reversed"]) == list(shown["seen"])
    assert views.has_speed == (stored >= 4 * min(3, seen - 1) + 1)
    if views.has_speed:
        assert len({len(shown[f"speed {speed}"]) for speed in (1, 2, 4)}) == 1
        assert len({shown[f"speed {speed}"][len(shown["speed 1"]) // 2] for speed in (1, 2, 4)}) == 1
    else:
        assert "playback speed is left out: stored clips have" in views.note


def test_no_video_is_on_both_sides(tmp_path: Path) -> None:
    """Held-out videos test; if they are too few, half of all do, with a note; below 20 videos it is refused."""
    plenty = footage(tmp_path / "plenty", videos=20)
    chosen = plan_motion(plenty)
    assert chosen.note == ""
    assert chosen.test.tolist() == chosen.rows["held_out"].to_pylist()
    few = plan_motion(make_data_set(tmp_path / "few", num_videos=24, clips_per_video=3, num_held_out=4))
    assert "half of all 24 videos, because 4 are held out and 10 are needed" in few.note
    videos = np.asarray(few.rows["video_id"].to_pylist())
    assert not set(videos[few.test]) & set(videos[~few.test])
    assert len(set(videos[few.test])) == 12
    with pytest.raises(ValueError, match="the data set has 19 videos, and motion needs 20"):
        plan_motion(make_data_set(tmp_path / "none", num_videos=19))


def test_a_broken_encoder_is_refused(moving: Manifest) -> None:
    """A feature that is not a number is an error, as in the other scores."""
    chosen, views = plan_motion(moving), make_views(Window(8, 1), FRAMES)
    broken = {view: np.full((chosen.rows.num_rows, 2), np.nan, np.float32) for view in views.numbers}
    with pytest.raises(ValueError, match="a feature of encoder is not finite"):
        measure_motion({ENCODER: broken}, chosen, views, clip_seconds=1.0)


def test_checkpoints_are_scored_by_arrow_too(moving: Manifest) -> None:
    """It is high for an encoder that sees motion, at chance for one that sees single frames, and tracked."""
    found = score_encoder(flow(), moving)
    assert found.arrow is not None
    assert found.arrow.low > 0.75
    assert found.numbers()["arrow"] == found.arrow.value
    alone = score_encoder(middle_frame(), moving).arrow
    assert alone is not None
    assert alone.low <= 0.5 <= alone.high


def test_checkpoints_are_probed_as_in_the_protocol(moving: Manifest) -> None:
    """The same shares of speed and order as with all baselines; a part of the clips is enough to see motion."""
    full = measured(flow(), moving)
    found = probe_encoder(flow(), moving, max_clips=CLIPS_OF_A_PART)
    assert found == {probe: full[probe].by[ENCODER].value for probe in ("speed", "order")}
    assert probe_encoder(flow(), moving, max_clips=40)["speed"] > 0.6
    assert plan_motion(moving, max_clips=40).rows.num_rows == 80


@pytest.mark.cluster
def test_the_protocol_measures_on_the_workers(ray_cluster: LocalCluster, moving: Manifest, tmp_path: Path) -> None:
    """The job gives the same figures as this process, with all baselines, without labels or other protocols."""
    settings = EvaluateSettings(data=moving.uri, protocols=("motion",), features=str(tmp_path), max_workers=2)
    planned = evaluation.plan(settings)
    lines: list[str] = []
    encoder = encoder_of(num_frames=8, fps=25.0)
    scores = evaluation.evaluate(encoder, planned, settings, show=lines.append)
    assert [score.protocol for score in scores] == ["motion-arrow", "motion-speed", "motion-order"]
    expected = measured(encoder, moving)
    for score in scores:
        here = expected[score.protocol.removeprefix("motion-")]
        assert score.value == pytest.approx(here.by[ENCODER].value, abs=0.02), (
            "forwards of other batches round otherwise"
        )
        for beside in ("random initialisation", "single frame", "mean colours", f"chance {here.chance:.1%}"):
            assert beside in score.beside
    assert any("playback speed shows 4 of the 8 frames" in line for line in lines)
