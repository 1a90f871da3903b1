"""What pretraining has changed: compares an encoder with random weights of the same network, on held-out clips.

The same code scores both on the same clips, without colour: by searches, and by linear probes of motion. The table also
gives chance and mean colour alone, because a score that colour reaches too shows nothing. `compare` returns one `Row`
for each score: to add a score, add a row.
"""

from __future__ import annotations

import base64
import html
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.foreign import random_initialisation
from vmoco.evaluate.embed_items import shard_items
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Features, Frames, embed_batch, mean_colour, window, without_colour
from vmoco.evaluate.gallery import STYLE, nearest_rows
from vmoco.evaluate.knn import centred
from vmoco.evaluate.motion import COLOUR, ENCODER, RANDOM, Motion, measure_probes, plan_motion
from vmoco.evaluate.motion_probes import view_features
from vmoco.evaluate.score import Answers, Estimate, TooFewVideosError, score_encoder, scored_clips
from vmoco.evaluate.table import FeatureTable
from vmoco.job_settings import EmbedSettings
from vmoco.seed import hash64, uniforms

BEFORE, AFTER = "random initialisation", "this encoder"
MAX_CLIPS = 200
"""Clips whose other crop is searched for."""
_CROP = 0.7
"""Side of a crop, as a fraction of the short side of the frames."""
_QUERIES = 8
"""Clips whose nearest clips the page shows."""

_TABLE_STYLE = """
table { border-collapse: collapse; } th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
tr { border-top: 1px solid var(--line); } .loss { width: 500px; max-width: 100%; height: auto; }
h3 { font-size: .8rem; margin: .8rem 0 0; } h3 + .row { border: 0; padding: .2rem 0; }
"""


@dataclass(frozen=True)
class Row:
    """One score of both encoders."""

    name: str
    chance: float
    by_colour: float
    """The score of mean colour alone, from the unchanged clips."""
    before: Estimate
    """The score of random weights."""
    after: Estimate
    difference: Estimate
    """Of the two, clip by clip: its interval is narrower than theirs let expect, because both see the same clips."""

    @classmethod
    def of(cls, name: str, before: Answers, after: Answers, *, chance: float, by_colour: float) -> Row:
        """The row of the answers of both encoders."""
        return cls(name, chance, by_colour, before.estimate(), after.estimate(), after.above(before))

    @classmethod
    def of_probe(cls, name: str, found: Motion) -> Row:
        """The row of a linear probe on the features of both encoders."""
        assert found.gain is not None
        by = found.by
        return cls(name, found.chance, by[COLOUR].value, by[RANDOM], by[ENCODER], found.gain)

    def cells(self) -> tuple[str, ...]:
        """The texts of one line of the table, in the order of `COLUMNS`."""
        apart = self.difference
        value, low, high = (round(100 * each, 1) + 0.0 for each in (apart.value, apart.low, apart.high))  # never -0.0
        points = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        return (self.name, f"{self.chance:.1%}", f"{self.by_colour:.1%}", str(self.before), str(self.after), points)


MEANING = (
    "The first scores are the share of clips whose nearest clip is the right one: another clip of the same video or "
    "part of a video, or another, mirrored crop of the same clip. Those by a probe are the share of clips of which a "
    "linear classifier of features tells whether they are played 1, 2 or 4 times as fast, or with their halves "
    "exchanged."
)
"""What the scores count, for the user."""
COLUMNS = ("score on held-out clips, without colour", "chance", "colour alone", BEFORE, AFTER, "points more")


@dataclass(frozen=True)
class Comparison:
    """Both encoders on one data set."""

    rows: tuple[Row, ...]
    """Empty where there are too few videos for any score."""
    num_videos: int
    """Held-out videos that were scored."""
    num_clips: int
    """Held-out clips."""
    notes: tuple[str, ...] = ()
    """What is left out or restricted, and why, as messages for the user."""

    def limits(self) -> str:
        """What the table does not show, as a text for the user."""
        return (
            f"In brackets: 95 % intervals over {self.num_videos} held-out videos or parts of videos "
            f"({self.num_clips} clips). The difference is on the same clips; where its interval contains 0, it may be "
            "chance. With so few videos, the scores say nothing about other videos."
        )


def compare(encoder: Encoder, manifest: Manifest, *, seed: int = 0) -> Comparison:
    """Scores an encoder and its random initialisation on the held-out clips of a data set.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        seed: of the random weights.

    Raises:
        TooFewVideosError: fewer than two clips are held out, so there is nothing to compare.
    """
    held_out = manifest.held_out()
    if held_out.num_rows < 2:
        raise TooFewVideosError(
            f"{held_out.num_rows} clips are held out, and a comparison needs two: ingest more videos, or with a larger "
            "--held-out-percent"
        )
    try:
        pairs, _ = scored_clips(manifest)
    except TooFewVideosError as error:
        return Comparison((), 0, held_out.num_rows, (f"no scores: {error}",))
    untrained = random_initialisation(encoder, seed=seed)
    before, after = (score_encoder(each, manifest) for each in (untrained, encoder))
    assert before.answers is not None
    assert after.answers is not None
    rows = [
        Row.of(
            "same video at another time", before.answers, after.answers, chance=after.chance, by_colour=after.by_colour
        ),
        _crop_row(encoder, untrained, manifest, held_out),
    ]
    notes: tuple[str, ...] = ()
    try:
        probed, notes = _probe_rows(encoder, untrained, manifest)
    except TooFewVideosError as error:
        notes = (f"no probes of motion: {error}",)
    else:
        rows += probed
    return Comparison(tuple(rows), len(pairs["video_id"].unique()), held_out.num_rows, notes)


_PROBES = {"speed": "playback speed, by a probe", "order": "order of halves, by a probe"}


def _probe_rows(encoder: Encoder, untrained: Encoder, manifest: Manifest) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of the linear probes of motion, with notes; TooFewVideosError where there are too few videos."""
    chosen = plan_motion(manifest)
    views, features, notes = view_features({ENCODER: encoder, RANDOM: untrained}, manifest, chosen)
    rows = [Row.of_probe(_PROBES[found.probe], found) for found in measure_probes(features, chosen, views)]
    return rows, tuple(filter(None, (chosen.note, *notes)))


def _crop_row(encoder: Encoder, untrained: Encoder, manifest: Manifest, held_out: pa.Table) -> Row:
    """Searches for a crop of each clip among other, mirrored crops of all clips: the task that pretraining solves."""
    places = np.unique(np.linspace(0, held_out.num_rows - 1, min(MAX_CLIPS, held_out.num_rows)).round().astype(int))
    rows = held_out.take(pa.array(places))
    videos = np.array(rows["video_id"].to_pylist())
    crops = _crops(encoder, manifest, rows)
    colours = [np.stack([mean_colour(frames) for frames in view]) for view in crops]
    right_by_colour = found(-((colours[0][:, None] - colours[1][None]) ** 2).sum(axis=2))
    grey = [[without_colour(frames) for frames in view] for view in crops]
    before, after = (
        Answers(found(queries @ gallery.T), np.concatenate([videos, videos]))
        for queries, gallery in ([_features(each, view) for view in grey] for each in (untrained, encoder))
    )
    by_colour = float(right_by_colour.mean())
    return Row.of("same clip in another crop", before, after, chance=1 / len(rows), by_colour=by_colour)


def found(similarity: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """1 where the best match of a row, then of a column, is on the diagonal: (N, N) -> (2 N,)."""
    matches = np.arange(len(similarity))
    right = [similarity.argmax(axis=1) == matches, similarity.argmax(axis=0) == matches]
    return np.concatenate(right).astype(np.float64)


def _crops(encoder: Encoder, manifest: Manifest, rows: pa.Table) -> tuple[list[Frames], list[Frames]]:
    """Two square crops of each clip, the second mirrored. The clip's name determines their positions."""
    numbers = window(encoder, manifest).numbers(manifest.frame_shape[0])
    reader = ClipReader.of(manifest, rows, crop=True)
    clips = reader.several(range(rows.num_rows), itertools.repeat(numbers))
    seeds = np.array([hash64("other crop", clip_id) for clip_id in rows["clip_id"].to_pylist()], np.uint64)
    first, second = [], []
    for frames, (top, left, other_top, other_left) in zip(clips, uniforms(seeds, [0, 1, 2, 3]), strict=True):
        first.append(_square(frames, top, left))
        second.append(np.ascontiguousarray(_square(frames, other_top, other_left)[:, :, ::-1]))
    return first, second


def _square(frames: Frames, top: float, left: float) -> Frames:
    height, width = frames.shape[1:3]
    side = max(1, round(_CROP * min(height, width)))
    at, start = int(top * (height - side + 1)), int(left * (width - side + 1))
    return frames[:, at : at + side, start : start + side]


def _features(encoder: Encoder, clips: Sequence[Frames], *, batch_size: int = 16) -> Features:
    batches = [embed_batch(encoder, clips[at : at + batch_size]) for at in range(0, len(clips), batch_size)]
    return centred(np.concatenate([batch.numpy() for batch in batches]))


def write_page(
    file: Path, encoder: Encoder, manifest: Manifest, compared: Comparison, *, title: str, loss: Path | None = None
) -> None:
    """Writes one HTML file that needs no network: the table, the loss curve, and nearest clips before and after.

    Args:
        file: path of the page.
        encoder: in evaluation mode.
        manifest: data set.
        compared: the scores.
        title: name of the encoder.
        loss: picture of the loss curve (PNG); None leaves it out.
    """
    rows = [_nearest(each, manifest) for each in (random_initialisation(encoder, seed=0), encoder)]
    pairs = "".join(
        f"<section><h3>{BEFORE}</h3>{before}<h3>{AFTER}</h3>{after}</section>\n"
        for before, after in zip(*rows, strict=True)
    )
    scores = ""
    if compared.rows:
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells()) for row in compared.rows]
        scores = f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>\n"
        scores += f"<p>{html.escape(MEANING)} {html.escape(compared.limits())}</p>\n"
    scores += "".join(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>\n" for note in compared.notes)
    curve = ""
    if loss is not None:
        source = base64.b64encode(loss.read_bytes()).decode()
        curve = f'<h2>Training</h2>\n<img class="loss" alt="loss curve" src="data:image/png;base64,{source}">\n'
        curve += (
            "<p>The contrastive loss of each training step. It rises where the generator begins to drop frames "
            "(<code>--generator.start-percent</code>), because this makes the task harder.</p>\n"
        )
    head = html.escape(title)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{head}: before and after</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}{_TABLE_STYLE}</style></head><body>
<h1>{head}: before and after pretraining</h1>
{scores}{curve}<h2>Nearest clips</h2>
<p>A held-out clip is on the left; beside it are the nearest other held-out clips, by the cosine of their features
(the number in bold), after the mean of all clips is subtracted. The encoders
see all clips without colour. A green frame marks a clip of the same video, or of the same part of a video.</p>
{pairs}</body></html>
"""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)


def _nearest(encoder: Encoder, manifest: Manifest) -> list[str]:
    """The nearest held-out clips of a few held-out clips, as HTML."""
    with tempfile.TemporaryDirectory(prefix="vmoco-before-after-") as folder:
        work = Work(output=folder, window=window(encoder, manifest), batch_size=16, colour=False)
        task, items = EmbedTask(encoder, work), shard_items(manifest, manifest.held_out())
        for item in items:
            if error := task(item)["error"]:
                raise ValueError(error)
        table = FeatureTable(folder, [item["part"] for item in items])
        return nearest_rows(table, encoder, EmbedSettings(videos=manifest.uri, output=folder, queries=_QUERIES))
