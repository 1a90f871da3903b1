"""Motion probes: does an encoder see motion? They need no labels. Each view of a clip consists of its stored frames.

- `arrow`: is a clip A nearer to another clip B of its video than to B played backwards? (`score.arrow`)
- `speed`: can a linear probe distinguish frames that are 1, 2 and 4 stored frames apart?
- `order`: can a linear probe distinguish a clip from the same clip with its halves exchanged?

Probes are fitted and tested on different videos. The classes of a probe share as many frames as possible, because what
a single frame reveals is not motion: the middle frame is the same at each speed, and exchanging the halves keeps all
frames. Clips are shown without colour. Each figure comes with four baselines: chance; the same network with random
weights; the encoder on the middle frame, repeated; and the mean colours of the frames with their changes.

Limits of the probes:
- `speed` does not need the direction of motion: an encoder that only measures how much neighbouring frames differ does
  well. So does a random network: look at the difference from it. A converted frame rate repeats frames, which reveals
  the speed; the share of such clips is reported. Footage without motion has no speed.
- Exchanging the halves makes a cut in the middle. An encoder that sees the cut solves `order` without knowing the
  direction of time. A fade, or a sharper first frame of a video, reveals the order: then the single frame or the
  colours exceed chance.
- `arrow` stays at chance if the clips of a video move independently of each other, or if the movement looks the same
  backwards.
- All three depend on the footage: compare encoders only on the same data set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.clip_cache import cache_for
from vmoco.data.coded import codes, strings
from vmoco.data.held_out import SOURCE_COLUMNS, sources_of
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.promotion import Score
from vmoco.evaluate.features import Features, Window
from vmoco.evaluate.probe import fit_probe
from vmoco.evaluate.score import Estimate, TooFewVideosError, arrow_right, choose_pairs, estimate
from vmoco.seed import hash64

SPEEDS = (1, 2, 4)
MIN_FRAMES = 4
"""Fewest frames of a view at each speed: with fewer, a network that halves time twice has nothing left to compare."""
MIN_VIDEOS = 10
"""Fewest videos to fit a probe on, and fewest to test it on."""
CLIPS = 1000
"""Most clips that are embedded of each part, at most 8 of a video."""
MAX_CLIPS_PER_VIDEO = 8
SEEN, REVERSED, SWAPPED = "seen", "reversed", "swapped"
ENCODER, RANDOM, STILL, COLOUR = "encoder", "random initialisation", "single frame", "mean colours"
_STILL = "still "  # before the name of a view
_REPEATS = 0.1  # a larger share of clips that repeat a frame is reported

ByView = Mapping[str, Features]
"""Features of all clips for each view, float32 (N, D), by the name of the view."""


@dataclass(frozen=True)
class MotionPlan:
    """The clips that take part."""

    rows: pa.Table
    """Rows of the manifest's table."""
    test: npt.NDArray[np.bool_]
    """(N,), True for the rows that test the probes."""
    note: str = ""
    """If too few videos are held out: how the videos were divided, as a message for the user."""


@dataclass(frozen=True)
class Views:
    """Which stored frames each view of a clip shows."""

    numbers: dict[str, tuple[int, ...]]
    """Numbers of the frames, in order, by the name of the view."""
    note: str = ""
    """Why speed is left out or sees fewer frames, as a message for the user."""

    @property
    def moving(self) -> list[str]:
        """Names of the views that the probes compare; the others repeat one frame."""
        return [view for view in self.numbers if not view.startswith(_STILL)]

    @property
    def has_speed(self) -> bool:
        """Whether stored clips are long enough for the probe of speed."""
        return speed_view(SPEEDS[0]) in self.numbers


@dataclass(frozen=True)
class Motion:
    """What one probe measured."""

    probe: str
    """arrow, speed or order."""
    chance: float
    by: dict[str, Estimate]
    """The share of right answers of the encoder and of each baseline, by name."""
    gain: Estimate | None
    """That of the encoder minus that of random initialisation; None without that baseline."""
    num_videos: int

    def score(self, evaluation_set: str) -> Score:
        """The score to record."""
        gain = f"{self.gain} above random initialisation; " if self.gain else ""
        beside = [f"{name} {found}" for name, found in self.by.items() if name != ENCODER]
        text = f"{gain}{', '.join([*beside, f'chance {self.chance:.1%}'])}; {self.num_videos} videos"
        found = self.by[ENCODER]
        return Score(f"motion-{self.probe}", evaluation_set, found.value, found.low, found.high, text)


def plan_motion(manifest: Manifest, *, max_clips: int = CLIPS) -> MotionPlan:
    """Chooses clips and divides their videos: held-out videos test, or half of all videos where those are too few.

    Args:
        manifest: data set.
        max_clips: most clips of each part.

    Raises:
        TooFewVideosError: the data set has fewer than 20 videos.
    """
    table = manifest.columns(["video_id", "held_out", "start_seconds"])
    names, numbers = strings(table["video_id"]), codes(table["video_id"])
    held_out = np.isin(numbers, numbers[table["held_out"].to_numpy()])
    note = ""
    if min(len(set(names[held_out])), len(set(names[~held_out]))) < MIN_VIDEOS:
        # By source: otherwise ranges of one file would fit the probes and test them.
        sources = np.asarray(sources_of(manifest.columns(SOURCE_COLUMNS)), dtype=object)
        videos = sorted(set(sources), key=lambda name: hash64("motion test", name))
        if len(videos) < 2 * MIN_VIDEOS:
            raise TooFewVideosError(
                f"the data set has {len(videos)} videos, and motion needs {2 * MIN_VIDEOS}: half of them to fit the "
                "probes, half to test them. Ranges of one file count as one video. Ingest more videos"
            )
        note = (
            f"motion tests on half of all {len(videos)} videos, because {len(set(names[held_out]))} are held out and "
            f"{MIN_VIDEOS} are needed; the encoder may have been trained on them"
        )
        held_out = np.isin(sources, videos[: len(videos) // 2])
    starts = table["start_seconds"].to_numpy()
    parts = [np.flatnonzero(part) for part in (~held_out, held_out)]
    rows = np.concatenate([_spread_clips(names, starts, part, most=max_clips) for part in parts])
    return MotionPlan(manifest.take(rows), held_out[rows], note)


def _spread_clips(
    names: npt.NDArray[np.object_], starts: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], *, most: int
) -> npt.NDArray[np.int64]:
    """Rows of at most `most` clips: some of each video, evenly spread over it. A fixed draw leaves out more videos.

    Args:
        names: (N,), video of each row of the manifest.
        starts: (N,), second of its video at which its clip begins.
        rows: among which it chooses.
        most: number of rows that it chooses.
    """
    names = names[rows]
    videos = sorted(set(names), key=lambda name: hash64("motion video", name))
    per_video = int(np.clip(most // len(videos), 2, MAX_CLIPS_PER_VIDEO))
    members: dict[str, list[int]] = {video: [] for video in videos[: most // per_video]}
    for row, name in zip(rows, names, strict=True):
        if name in members:
            members[name].append(row)
    chosen = []
    for clips in members.values():
        places = np.linspace(0, len(clips) - 1, min(per_video, len(clips))).round().astype(int)
        chosen += [sorted(clips, key=lambda row: starts[row])[place] for place in places]
    return np.array(sorted(chosen), np.int64)


def speed_view(speed: int) -> str:
    """Name of the view of frames that are `speed` stored frames apart."""
    return f"speed {speed}"


def still(view: str) -> str:
    """Name of the view that repeats the middle frame of another view."""
    return f"{_STILL}{view}"


def make_views(window: Window, num_stored: int, *, min_frames: int = MIN_FRAMES) -> Views:
    """The views of stored clips of `num_stored` frames for an encoder that sees the frames of `window`.

    The views of speed show as many frames as the encoder sees, or as many as fit. Their middle frame is the same:

        stored   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
        speed 1                    x  x  X  x
        speed 2              x     x     X     x
        speed 4  x           x           X           x              (of 16 stored frames, moved to the middle)
    """
    seen = tuple(window.numbers(num_stored))
    half = len(seen) // 2
    numbers = {SEEN: seen, REVERSED: seen[::-1], SWAPPED: seen[half:] + seen[:half]}
    fastest = max(SPEEDS)
    count = min(len(seen), (num_stored - 1) // fastest + 1)
    needed, note = (len(seen) - 1) * fastest + 1, ""
    fix = f"ingest with --num-frames {needed} for all of them"
    if count >= min(min_frames, len(seen)):
        middle = (num_stored - 1 - (count - 1) * fastest) // 2 + count // 2 * fastest
        for speed in SPEEDS:
            numbers[speed_view(speed)] = tuple(middle + (place - count // 2) * speed for place in range(count))
        if count < len(seen):
            note = (
                f"playback speed shows {count} of the {len(seen)} frames that the encoder sees, because stored clips "
                f"have {num_stored} frames: {fix}"
            )
    else:
        note = (
            f"playback speed is left out: stored clips have {num_stored} frames, and {min_frames} frames at speed "
            f"{fastest} need {(min_frames - 1) * fastest + 1}; {fix}"
        )
    stills = {still(view): (shown[len(shown) // 2],) * len(shown) for view, shown in numbers.items()}
    # The middle frame is the same at each speed, so one view serves for all.
    kept = {view: shown for view, shown in stills.items() if view not in map(still, map(speed_view, SPEEDS[1:]))}
    return Views(numbers | kept, note)


def probe_views(views: Views) -> dict[str, tuple[str, ...]]:
    """The classes of each linear probe: names of views, by probe."""
    probes = {"speed": tuple(map(speed_view, SPEEDS))} if views.has_speed else {}
    return probes | {"order": (SEEN, SWAPPED)}


def split_views(features: Features, views: Sequence[str]) -> ByView:
    """Features of all views in one row, float32 (N, len(views) * D), by view."""
    return dict(zip(views, np.split(features, len(views), axis=1), strict=True))


def still_features(encoder: ByView) -> ByView:
    """The baseline of a single frame: the encoder's features of the middle frame of each view, repeated."""
    # Views at other speeds share the middle frame of the first.
    of_speed = encoder.get(still(speed_view(SPEEDS[0])))
    found = {view: encoder.get(still(view), of_speed) for view in encoder if not view.startswith(_STILL)}
    return {view: features for view, features in found.items() if features is not None}


def colour_features(colours: npt.NDArray[np.float32], views: Views) -> ByView:
    """The baseline of colours: the mean colour of each shown frame, and its change to the next frame.

    Args:
        colours: float32 (N, T, 3), mean colour of each stored frame.
        views: which of them are shown.
    """
    found = {}
    for view, numbers in views.numbers.items():
        shown = colours[:, list(numbers)]
        changes = np.abs(np.diff(shown, axis=1))
        found[view] = np.concatenate([shown, changes], axis=1).reshape(len(colours), -1)
    return found


def read_colours(manifest: Manifest, rows: pa.Table) -> tuple[npt.NDArray[np.float32], str]:
    """Mean colour of each stored frame, float32 (N, T, 3); and a warning if many clips repeat a frame, or "".

    Raises:
        ValueError: a clip is damaged.
    """
    reader = ClipReader.of(manifest, rows, crop=True, cache=cache_for(manifest.uri))
    colours = np.empty((rows.num_rows, manifest.frame_shape[0], 3), np.float32)
    repeats = 0
    for place, frames in enumerate(reader.several(range(rows.num_rows))):
        colours[place] = frames.mean(axis=(1, 2), dtype=np.float64)
        repeats += bool((frames[1:] == frames[:-1]).all(axis=(1, 2, 3)).any())
    note = ""
    if repeats > _REPEATS * rows.num_rows:
        note = (
            f"{repeats / rows.num_rows:.0%} of the clips repeat a frame: nothing moves in them, or their frame rate "
            "was converted, which reveals the playback speed"
        )
    return colours, note


def measure_motion(
    sources: Mapping[str, ByView], chosen: MotionPlan, views: Views, *, clip_seconds: npt.ArrayLike
) -> list[Motion]:
    """Arrow and the linear probes, of an encoder and its baselines.

    Args:
        sources: features by view, of the encoder (ENCODER) and of baselines, by name; rows as in `chosen`.
        chosen: the clips.
        views: of each clip.
        clip_seconds: (N,) or one number, length of a stored clip; pairs for `arrow` do not overlap.

    Returns:
        arrow, unless fewer than two test videos have two clips apart; speed, if clips are long enough; order.

    Raises:
        ValueError: a feature is not finite.
    """
    _check_finite(sources)
    test, films = chosen.test, np.asarray(sources_of(chosen.rows), dtype=object)
    videos = np.asarray(chosen.rows["video_id"].to_pylist(), dtype=object)
    found = []
    try:
        starts = chosen.rows["start_seconds"].to_numpy()
        lengths = np.broadcast_to(np.asarray(clip_seconds, np.float64), starts.shape)
        pairs = choose_pairs(
            list(videos[test]), start_seconds=starts[test], clip_seconds=lengths[test], sources=list(films[test])
        )
    except TooFewVideosError:
        pass  # no video of the test part has two clips to compare
    else:
        right = {
            source: arrow_right(features[SEEN][test], features[REVERSED][test], pairs=pairs).ravel()
            for source, features in sources.items()
        }
        found.append(_motion("arrow", 1 / 2, right, np.tile(films[test][pairs[0, :, 0]], 2 * pairs.shape[0])))
    return found + measure_probes(sources, chosen, views)


def measure_probes(sources: Mapping[str, ByView], chosen: MotionPlan, views: Views) -> list[Motion]:
    """The linear probes alone: speed, if clips are long enough, and order. Arguments and errors as `measure_motion`."""
    _check_finite(sources)
    test, films = chosen.test, np.asarray(sources_of(chosen.rows), dtype=object)
    found = []
    for probe, classes in probe_views(views).items():
        right = {
            source: _probe_right([features[view] for view in classes], films, test)
            for source, features in sources.items()
        }
        found.append(_motion(probe, 1 / len(classes), right, np.tile(films[test], len(classes))))
    return found


def _check_finite(sources: Mapping[str, ByView]) -> None:
    for source, features in sources.items():
        if not all(np.isfinite(shown).all() for shown in features.values()):
            raise ValueError(f"a feature of {source} is not finite: the encoder is broken and cannot be scored")


def _probe_right(
    classes: Sequence[Features], films: npt.NDArray[np.object_], test: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """1 where a linear probe recognises the view of a test clip; all test clips of a view, view after view."""
    train, tested = (np.concatenate([features[part] for features in classes]) for part in (~test, test))
    labels, truth = (np.repeat(np.arange(len(classes)), int(part.sum())) for part in (~test, test))
    probe = fit_probe(train, labels, video_ids=list(np.tile(films[~test], len(classes))))
    return (probe.predict(tested) == truth).astype(np.float64)


def _motion(
    probe: str, chance: float, right: Mapping[str, npt.NDArray[np.float64]], groups: npt.NDArray[Any]
) -> Motion:
    by = {source: estimate(values, groups) for source, values in right.items()}
    gain = estimate(right[ENCODER] - right[RANDOM], groups) if RANDOM in right else None
    return Motion(probe, chance, by, gain, len(np.unique(groups)))


def evaluation_set(chosen: MotionPlan, views: Views) -> str:
    """Hash of the clips, of their division into parts, and of the frames that are shown."""
    clips = "".join(chosen.rows["clip_id"].to_pylist()) + "".join(chosen.rows["sha256"].to_pylist())
    return f"{hash64('motion', clips, str(chosen.test.tolist()), json.dumps(views.numbers)):016x}"
