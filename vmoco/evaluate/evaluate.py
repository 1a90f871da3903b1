"""Evaluates encoders on a data set: `embed` computes features, then one Ray task runs per protocol and split.

A score is a mean over videos with its interval. With several splits, the test videos of all splits count, and the
bootstrap treats a video that is tested in two splits as one video.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vmoco import storage
from vmoco.data.held_out import sources_of
from vmoco.data.manifest import Manifest
from vmoco.encoders import foreign
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.promotion import Score
from vmoco.evaluate import embed_items, motion
from vmoco.evaluate import score as label_free
from vmoco.evaluate.embed import run_items
from vmoco.evaluate.embed_items import Items
from vmoco.evaluate.embed_task import Work
from vmoco.evaluate.features import Window, window
from vmoco.evaluate.finetune import finetune
from vmoco.evaluate.protocols import COLUMNS, MEASURES, Measured, Split, find_splits
from vmoco.evaluate.score import estimate, label_free_score
from vmoco.evaluate.table import SPLITS, FeatureTable
from vmoco.job_settings import EvaluateSettings, Protocol
from vmoco.seed import hash64, hash64_of

LABEL_FREE: Protocol = "label-free"
MOTION: Protocol = "motion"
FROZEN: tuple[Protocol, ...] = ("knn", "probe", "retrieval")


@dataclass(frozen=True)
class EvaluationPlan:
    """The protocols and splits to measure, checked before any work."""

    manifest: Manifest
    protocols: tuple[Protocol, ...]
    splits: tuple[Split, ...]
    """Over the rows of the manifest's table; empty where no protocol needs labels."""
    notes: tuple[str, ...]
    """Why protocols are left out, as messages for the user."""
    motion: motion.MotionPlan | None = None
    """The clips of the motion probes; None if they are not measured."""


def plan(settings: EvaluateSettings) -> EvaluationPlan:
    """Checks what can be measured on the data set.

    Raises:
        ValueError: the data set cannot be used for a protocol that was asked for.
    """
    manifest = Manifest.load(storage.require_absolute(settings.data, "--data"))
    notes: list[str] = []
    protocols: list[Protocol] = list(settings.protocols)
    labelled = any(piece["label"].null_count < piece.num_rows for piece in manifest.batches(["label"]))
    if not protocols:
        protocols = [LABEL_FREE, *(FROZEN if labelled else ())]
        try:
            label_free.scored_clips(manifest)
        except label_free.TooFewVideosError as error:
            if not labelled:
                raise
            protocols.remove(LABEL_FREE)
            notes.append(f"{LABEL_FREE} is left out: {error}")
        if not labelled:
            notes.append("the data set has no labels, so only the label-free score is measured")
    elif LABEL_FREE in protocols:
        label_free.scored_clips(manifest)
    moving = motion.plan_motion(manifest) if MOTION in protocols else None
    if moving and moving.note:
        notes.append(moving.note)
    with_labels = [protocol for protocol in protocols if protocol not in (LABEL_FREE, MOTION)]
    splits = find_splits(manifest.columns(COLUMNS), settings.splits, protocol=with_labels[0]) if with_labels else []
    return EvaluationPlan(manifest, tuple(dict.fromkeys(protocols)), tuple(splits), tuple(notes), moving)


def evaluate(
    encoder: Encoder, planned: EvaluationPlan, settings: EvaluateSettings, *, show: Callable[[str], None] = print
) -> list[Score]:
    """Measures an encoder; needs an initialised Ray.

    Raises:
        ValueError: the encoder does not fit the data set, or a worker met an error that the user has to fix.
    """
    seen = window(encoder, planned.manifest)
    if seen.note:
        show(f"warning: {seen.note}")
    scores = []
    if LABEL_FREE in planned.protocols:
        scores.append(_label_free(encoder, planned, seen, settings, show))
    if planned.motion:
        scores += _motion(encoder, planned.manifest, planned.motion, seen, settings, show)
    frozen = [protocol for protocol in planned.protocols if protocol in FROZEN]
    tasks: list[Any] = []
    if frozen:
        used = np.any([split.train | split.test for split in planned.splits], axis=0)
        items = embed_items.of_data_set(planned.manifest, used)
        table_uri, parts = _embedded(encoder, planned.manifest, items, seen, settings, show, colour=True)
        tasks += [
            _remote(settings, gpu=False).remote(_measure, protocol, table_uri, parts, index, settings)
            for protocol in frozen
            for index in range(len(planned.splits))
        ]
    if "finetune" in planned.protocols:
        tasks += [
            _remote(settings, gpu=settings.use_gpu).remote(_finetune, encoder, planned.manifest, split, seen, settings)
            for split in planned.splits
        ]
    return scores + _scores(_results(tasks), planned, settings)


def _label_free(
    encoder: Encoder, planned: EvaluationPlan, seen: Window, settings: EvaluateSettings, show: Callable[[str], None]
) -> Score:
    manifest = planned.manifest
    rows, evaluation_set = label_free.scored_clips(manifest)
    items = embed_items.of_rows(manifest, rows)
    table = FeatureTable(*_embedded(encoder, manifest, items, seen, settings, show, colour=False))
    source_of = dict(zip(rows["clip_id"].to_pylist(), sources_of(rows), strict=True))
    about = table.columns(["clip_id", "video_id", "start_seconds", "clip_seconds"])
    found = label_free.score(
        table.features(),
        video_ids=about["video_id"].to_pylist(),
        start_seconds=about["start_seconds"].to_numpy(),
        clip_seconds=about["clip_seconds"].to_numpy(),
        colours=table.colours(),
        sources=[source_of[clip] for clip in about["clip_id"].to_pylist()],
    )
    show(str(found))
    return label_free_score(replace(found, evaluation_set=evaluation_set))


def _motion(
    encoder: Encoder,
    manifest: Manifest,
    chosen: motion.MotionPlan,
    seen: Window,
    settings: EvaluateSettings,
    show: Callable[[str], None],
) -> list[Score]:
    least = max(motion.MIN_FRAMES, encoder.min_frames)
    views = motion.make_views(seen, manifest.frame_shape[0], min_frames=least)
    colours, repeats = motion.read_colours(manifest, chosen.rows)
    for note in filter(None, (views.note, repeats)):
        show(f"warning: {note}")
    untrained = foreign.random_initialisation(encoder, seed=settings.seed)
    features = _features_by_view(encoder, list(views.numbers), views, manifest, chosen, seen, settings, show)
    sources = {
        motion.ENCODER: features,
        motion.RANDOM: _features_by_view(untrained, views.moving, views, manifest, chosen, seen, settings, show),
        motion.STILL: motion.still_features(features),
        motion.COLOUR: motion.colour_features(colours, views),
    }
    lengths = manifest.frame_shape[0] / chosen.rows["fps"].to_numpy()
    evaluation_set = motion.evaluation_set(chosen, views)
    measured = motion.measure_motion(sources, chosen, views, clip_seconds=lengths)
    if measured[0].probe != "arrow":
        show("warning: arrow is left out: fewer than two videos of the test part have two clips that do not overlap")
    return [each.score(evaluation_set) for each in measured]


def _features_by_view(
    encoder: Encoder,
    names: list[str],
    views: motion.Views,
    manifest: Manifest,
    chosen: motion.MotionPlan,
    seen: Window,
    settings: EvaluateSettings,
    show: Callable[[str], None],
) -> motion.ByView:
    shown = tuple(views.numbers[name] for name in names)
    items = embed_items.of_rows(manifest, chosen.rows)
    table = FeatureTable(*_embedded(encoder, manifest, items, seen, settings, show, colour=False, views=shown))
    # Rows of the table are in the order of the shards.
    there = table.columns(["clip_id"])["clip_id"].combine_chunks()
    places = pc.index_in(chosen.rows["clip_id"], value_set=there).to_numpy()
    return motion.split_views(table.features()[places], names)


def _embedded(
    encoder: Encoder,
    manifest: Manifest,
    items: Items,
    seen: Window,
    settings: EvaluateSettings,
    show: Callable[[str], None],
    *,
    colour: bool,
    views: tuple[tuple[int, ...], ...] = (),
) -> tuple[str, list[str]]:
    """Folder and parts of the table of features of some clips; what an earlier evaluation made is used again."""
    place = storage.require_absolute(settings.features or storage.join(storage.home(), "features"), "--features")
    frames = f"views{hash64('views', str(views)):016x}" if views else f"stride{seen.stride}"
    name = f"{manifest.hash}-{encoder.weights_hash()}-{frames}{'' if colour else '-grey'}"
    output = storage.join(place, name)
    work = Work(output=output, window=seen, batch_size=settings.batch_size, colour=colour, views=views)
    parts, _ = run_items(items, encoder, work, settings, show=show)
    return output, parts


def _remote(settings: EvaluateSettings, *, gpu: bool) -> Any:
    import ray

    @ray.remote(num_cpus=settings.cpus_per_worker, num_gpus=1 if gpu else 0)
    def call(function: Callable[..., Any], *words: Any) -> tuple[Any, str]:
        # Returned as a value: Ray would wrap an exception of a task in its own stack.
        try:
            return function(*words), ""
        except (OSError, ValueError) as error:
            return None, str(error)

    return call


def _results(tasks: Sequence[Any]) -> list[tuple[int, Measured]]:
    import ray

    results = []
    for found, error in ray.get(list(tasks)):
        if error:
            raise ValueError(error)
        results += found
    return results


def _measure(
    protocol: str, table_uri: str, parts: list[str], index: int, settings: EvaluateSettings
) -> list[tuple[int, Measured]]:
    """Runs one protocol on one split, in a Ray task."""
    table = FeatureTable(table_uri, parts)
    split = find_splits(table.columns(COLUMNS), settings.splits, protocol=protocol)[index]
    return [(index, measured) for measured in MEASURES[protocol](table, split, settings)]


def _finetune(
    encoder: Encoder, manifest: Manifest, split: Split, seen: Window, settings: EvaluateSettings
) -> list[tuple[int, Measured]]:
    """Fine-tunes on one split, in a Ray task."""
    import torch

    if not settings.use_gpu:
        torch.set_num_threads(settings.cpus_per_worker)
    device = "cuda" if settings.use_gpu else "cpu"
    return [(0, finetune(encoder, manifest, split, settings.finetune, window=seen, seed=settings.seed, device=device))]


def _scores(results: list[tuple[int, Measured]], planned: EvaluationPlan, settings: EvaluateSettings) -> list[Score]:
    """One score for each protocol, over all splits."""
    by_protocol: dict[str, list[Measured]] = {}
    for _, measured in results:
        by_protocol.setdefault(measured.protocol, []).append(measured)
    scores = []
    for protocol, measured_on in by_protocol.items():
        found = estimate(
            np.concatenate([each.right for each in measured_on]), np.concatenate([each.videos for each in measured_on])
        )
        details = sorted({each.detail for each in measured_on if each.detail})
        beside = "; ".join([f"chance {planned.splits[0].chance:.1%}", *details])
        evaluation_set = _evaluation_set(protocol, planned, settings)
        scores.append(Score(protocol, evaluation_set, found.value, found.low, found.high, beside))
    return scores


def _evaluation_set(protocol: str, planned: EvaluationPlan, settings: EvaluateSettings) -> str:
    """Hash of the clips, their labels and splits, and the settings of the protocol."""
    how = {
        "knn": [settings.k, settings.temperature],
        "probe": [settings.max_probe_clips],
        "finetune": [settings.finetune.model_dump(mode="json"), settings.seed],
    }
    names = [split.name for split in planned.splits]
    columns = _as_json(planned.manifest, ["clip_id", "sha256", "label", *SPLITS, "held_out"])
    return f"{hash64_of([protocol], [json.dumps([names, how.get(protocol)])], columns):016x}"


def _as_json(manifest: Manifest, names: Sequence[str]) -> Iterator[str]:
    """Columns of a manifest as `json.dumps` writes them, in pieces of text."""
    begin = "{"
    for name in names:
        yield f"{begin}{json.dumps(name)}: ["
        between = ""
        for piece in manifest.batches([name]):
            yield between + json.dumps(piece[name].to_pylist())[1:-1]
            between = ", "
        yield "]"
        begin = ", "
    yield "}"
