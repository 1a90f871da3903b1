"""gallery.html: clips with their nearest clips as moving thumbnails, and a map of all clips. One file, no network.

The table holds no pixels, so the thumbnails are read again from the data set or the videos.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vmoco import storage
from vmoco.data import source
from vmoco.data.coded import strings
from vmoco.data.ledger import VideoError
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.dense import slide
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.video_file import decoding
from vmoco.evaluate.embed import sliding_window
from vmoco.evaluate.knn import nearest
from vmoco.evaluate.table import Blocks, FeatureTable
from vmoco.job_settings import EmbedSettings
from vmoco.seed import hash64

PAGE = "gallery.html"
_SHOWN = 6
"""Nearest clips of each query."""
_MAPPED = 1500
"""Clips on the map, spread evenly over all."""
_HEIGHT, _FRAMES = 96, 8
"""Pixels and frames of a thumbnail."""

Features = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.row { display: flex; gap: .6rem; padding: .7rem 0; border-top: 1px solid var(--line); align-items: flex-start; }
figure { margin: 0; width: 132px; } figure.query { margin-right: 1rem; }
img { height: 96px; width: 128px; object-fit: cover; border-radius: 4px; border: 2px solid transparent; }
.query img { border-color: #3b82f6; } .same img { border-color: #22a06b; }
figcaption { font-size: .74rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
circle { fill-opacity: .75; } .key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; }
"""


@dataclass(frozen=True)
class Clip:
    """A clip of the table, with what the page shows about it."""

    row: int
    clip_id: str
    video_id: str
    start_seconds: float
    source: str
    place: int
    label: str | None


def write_gallery(table: FeatureTable, encoder: Encoder, settings: EmbedSettings, *, title: str) -> str:
    """Writes the page into the table's folder; returns its URI.

    Args:
        table: the embeddings.
        encoder: the encoder that made them.
        settings: where the clips came from, and how many queries are shown.
        title: name of the encoder.
    """
    rows = nearest_rows(table, encoder, settings)
    head = html.escape(title)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{head}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{head}</h1>
<p>{len(table)} clips of {len(set(table.strings("video_id")))} videos in {html.escape(settings.videos)}.</p>
<h2>Nearest clips</h2>
<p>A clip is on the left; beside it are its nearest clips by the cosine of their features (the number in bold),
after the mean of all clips is subtracted. A green frame marks a clip of the same
video. Mean colour alone often finds these too.</p>
{"".join(rows)}
<h2>Map</h2>
{_map(table)}
</body></html>
"""
    uri = storage.join(storage.absolute_uri(settings.output), PAGE)
    storage.write_atomic(uri, page.encode())
    return uri


def nearest_rows(table: FeatureTable, encoder: Encoder, settings: EmbedSettings) -> list[str]:
    """The HTML of each query with its nearest clips. Tables of the same clips give the same queries.

    Args:
        table: the embeddings.
        encoder: the encoder that made them.
        settings: where the clips came from, and how many queries are shown.
    """
    chosen, found, cosines = _nearest(table, settings.queries)
    clips = _clips(table, np.unique(np.concatenate([chosen, found.ravel()])))
    pictures = dict(_thumbnails(list(clips.values()), encoder, settings))
    return [
        _row(clips[int(query)], [clips[int(row)] for row in near], cosine, pictures)
        for query, near, cosine in zip(chosen, found, cosines, strict=True)
    ]


class _Centred:
    """Blocks of unit features without their common mean."""

    def __init__(self, blocks: Blocks, mean: npt.NDArray[np.float64]) -> None:
        self._blocks, self._mean = blocks, mean

    def __iter__(self) -> Iterator[Features]:
        for block in self._blocks:
            yield _unit(block - self._mean)


def _unit(features: npt.NDArray[np.floating]) -> Features:
    norms = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    return np.ascontiguousarray(features / norms, np.float32)


def _nearest(table: FeatureTable, num_queries: int) -> tuple[Rows, Rows, Features]:
    """Rows of the queries, of the nearest other clips of each, and their cosines."""
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in table.blocks()) / len(table)
    queries = _queries(table.columns(["video_id"])["video_id"], num_queries)
    mask = np.zeros(len(table), bool)
    mask[queries] = True
    features = _unit(table.features(mask) - mean)
    count = min(_SHOWN, len(table) - 1)
    cosines, rows = nearest(features, _Centred(table.blocks(), mean), k=count + 1)
    others = rows != queries[:, None]  # the clip itself is the nearest of all, unless another is equal to it
    others &= np.cumsum(others, axis=1) <= count
    others[:, -1] |= others.sum(axis=1) < count
    return queries, rows[others].reshape(len(queries), count), cosines[others].reshape(len(queries), count)


def _queries(videos: pa.ChunkedArray, count: int) -> Rows:
    """Sorted rows of `count` clips, by a fixed draw: one of each video; several if there are fewer videos than that."""
    drawn = sorted(videos.unique().to_pylist(), key=lambda video: hash64("gallery video", video))[:count]
    place = {video: at for at, video in enumerate(drawn)}
    rows = np.flatnonzero(pc.is_in(videos, pa.array(drawn, pa.string())).to_numpy())
    names = strings(videos.take(pa.array(rows))).tolist()
    turn, order = Counter[str](), []
    for row, video in sorted(zip(rows.tolist(), names, strict=True), key=lambda each: hash64("gallery", *each[::-1])):
        order.append((turn[video], place[video], row))
        turn[video] += 1
    return np.array(sorted(row for _, _, row in sorted(order)[:count]), np.int64)


def _clips(table: FeatureTable, places: Rows) -> dict[int, Clip]:
    """The clips at some places, which rise."""
    names = ("clip_id", "video_id", "start_seconds", "source", "row", "label")
    rows = table.rows(places, names).to_pylist()
    return {place: Clip(place, *row.values()) for place, row in zip(places.tolist(), rows, strict=True)}


def _row(query: Clip, near: list[Clip], cosines: Features, pictures: dict[int, str]) -> str:
    def figure(clip: Clip, kind: str, said: str) -> str:
        name = html.escape(f"{clip.video_id} @ {clip.start_seconds:.1f} s")
        label = f"<br>{html.escape(clip.label)}" if clip.label else ""
        return (
            f'<figure class="{kind}"><img src="{pictures[clip.row]}" alt="{name}">'
            f"<figcaption>{said}{name}{label}</figcaption></figure>"
        )

    shown = [figure(query, "query", "")]
    for clip, cosine in zip(near, cosines, strict=True):
        shown.append(figure(clip, "same" if clip.video_id == query.video_id else "other", f"<b>{cosine:.2f}</b> "))
    return f'<div class="row">{"".join(shown)}</div>\n'


def _thumbnails(clips: list[Clip], encoder: Encoder, settings: EmbedSettings) -> Iterator[tuple[int, str]]:
    """Moving pictures of clips as data URIs, by row of the table; each shard or video is opened once.

    Raises:
        ValueError: a clip has changed or is damaged, or a video can no longer be decoded.
    """
    place = storage.absolute_uri(settings.videos)
    if storage.exists(storage.join(place, NAME)):
        yield from stored_thumbnails(Manifest.load(place), clips)
        return
    by_source: dict[str, list[Clip]] = {}
    for clip in clips:
        by_source.setdefault(clip.source, []).append(clip)
    for name, members in by_source.items():
        try:
            frames = _decoded(place, name, {clip.place for clip in members}, encoder, settings)
        except VideoError as error:
            raise ValueError(
                f"video {name} can no longer be read ({error}): restore it, or give --no-gallery"
            ) from None
        for clip in members:
            pictures = frames[clip.place]
            yield clip.row, _animated(pictures[_shown_frames(len(pictures))])


def stored_thumbnails(manifest: Manifest, clips: list[Clip]) -> Iterator[tuple[int, str]]:
    """The thumbnails of clips of a data set: only the frames that are shown are decoded."""
    wanted = pa.array([clip.clip_id for clip in clips], pa.string())
    rows = manifest.rows(lambda piece: pc.is_in(piece["clip_id"], wanted))
    places = {name: at for at, name in enumerate(rows["clip_id"].to_pylist())}
    lost = [clip for clip in clips if clip.clip_id not in places]
    if lost:
        raise ValueError(
            f"clip {lost[0].clip_id} of {lost[0].video_id!r} is no longer in data set {manifest.uri}: run "
            "jobs/embed.py with another --output, or use --no-gallery"
        )
    shown = _shown_frames(manifest.frame_shape[0])
    order = [places[clip.clip_id] for clip in clips]
    frames = ClipReader.of(manifest, rows, crop=True).several(order, itertools.repeat(shown))
    for clip, pictures in zip(clips, frames, strict=True):
        yield clip.row, _animated(pictures)


def _shown_frames(num_frames: int) -> list[int]:
    """The frames of a clip that its thumbnail shows, spread evenly."""
    shown: list[int] = np.linspace(0, num_frames - 1, min(_FRAMES, num_frames)).round().astype(int).tolist()
    return shown


def _decoded(
    folder: str, name: str, places: set[int], encoder: Encoder, settings: EmbedSettings
) -> dict[int, npt.NDArray[np.uint8]]:
    """The clips with these numbers of a video, decoded as they were for the table."""
    filesystem, path = storage.filesystem(storage.join(folder, name))
    found = source.Found(name, filesystem.get_file_info(path).size or 0)
    seconds = settings.seconds_per_video

    def chosen(first: int, frames: npt.NDArray[np.uint8]) -> dict[int, npt.NDArray[np.uint8]]:
        return {first + at: clip.copy() for at, clip in enumerate(frames) if first + at in places}

    with decoding() as decoder, source.local_copy(folder, found) as path:
        if window := sliding_window(encoder, settings):
            size = settings.batch_size
            _, batches, _ = slide(encoder, path, window, chosen, decoder=decoder, batch_size=size, seconds=seconds)
            return {place: clip for batch in batches for place, clip in batch.items()}
        cut = encoder.cut_video(
            path,
            decoder=decoder,
            max_clips=settings.max_clips_per_video,
            seconds=seconds,
            short_videos=settings.short_videos,
        )
        return chosen(0, cut.frames)


def _animated(frames: npt.NDArray[np.uint8]) -> str:
    height, width = frames.shape[1:3]
    size = (max(1, round(width * _HEIGHT / height)), _HEIGHT)
    images = [Image.fromarray(frame).resize(size) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=120, loop=0, quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _map(table: FeatureTable) -> str:
    """All clips, or as many as fit, in two dimensions by t-SNE, coloured by label or by video."""
    rows = np.unique(np.linspace(0, len(table) - 1, min(_MAPPED, len(table))).round().astype(np.int64))
    mask = np.zeros(len(table), bool)
    mask[rows] = True
    at = flatten(table.features(mask))
    about = table.rows(rows, ("label", "video_id", "start_seconds"))
    labels, videos = strings(about["label"]), strings(about["video_id"])
    starts = about["start_seconds"].to_numpy()
    by_label = any(label is not None for label in labels)
    names = labels if by_label else videos
    keys = sorted({str(name) for name in names})
    # Golden angle: neighbours in the list, and any few of them, differ in hue.
    colours = {key: f"hsl({place * 137.5 % 360:.0f} 70% {(45, 60)[place % 2]}%)" for place, key in enumerate(keys)}
    points = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colours[str(name)]}"><title>'
        f"{html.escape(f'{video_id} @ {start:.1f} s')}{html.escape(f', {name}' if by_label else '')}</title></circle>"
        for (x, y), name, video_id, start in zip(at, names, videos, starts, strict=True)
    ]
    shown = [f'<span class="key" style="background:{colours[key]}"></span> {html.escape(key)}' for key in keys[:20]]
    more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
    kind = "label" if by_label else "video"
    return (
        f"<p>{len(rows)} clips by t-SNE of their features. Clips that are close are similar; long distances mean "
        f"little. Colour is the {kind}: "
        f'{" &ensp; ".join(shown)}{more}.</p>\n<svg viewBox="-10 -10 1020 620" role="img" '
        f'aria-label="map of the clips">{"".join(points)}</svg>'
    )


def flatten(features: Features) -> npt.NDArray[np.float64]:
    """Places of features (N, D) in two dimensions, float64 (N, 2): x in 0 to 1000, y in 0 to 600."""
    if len(features) < 8:  # too few for neighbourhoods: two directions of largest spread
        apart = features - features.mean(axis=0)
        left, values, _ = np.linalg.svd(apart, full_matrices=False)
        at = np.zeros((len(features), 2))
        at[:, : min(2, len(values))] = (left * values)[:, :2]
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        seed = hash64("gallery map") % 2**32
        at = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features).astype(np.float64)
    at -= at.min(axis=0)
    scaled: npt.NDArray[np.float64] = at / np.maximum(at.max(axis=0), 1e-9) * (1000, 600)
    return scaled
