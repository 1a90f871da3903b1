"""A pretraining run before any worker starts: it is checked, and gets its folder and its MLflow run.

`run.json` in the run's folder (`vmoco/train/run_folder.py`) holds the settings and the MLflow run. So the same name
resumes the run, and a run with other settings or data can never continue these checkpoints.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass

import safetensors.torch
import torch

from vmoco import storage, tracking
from vmoco.architectures import TRANSFORMERS
from vmoco.config import PretrainSettings
from vmoco.data.fit import check_fits, epoch_clips, fit_to_data, shot_warnings, window_warnings
from vmoco.data.held_out import scoring_problem
from vmoco.data.mixture import Mixture, absolute, shared_videos
from vmoco.data.training_clips import reasons
from vmoco.encoders import package
from vmoco.evaluate.motion_probes import motion_problem
from vmoco.model.cost import SCORE_SECONDS, scoring_seconds
from vmoco.model.queue import decay_at, oldest_key_weight
from vmoco.train import metrics
from vmoco.train.optimizer import REFERENCE_BATCH
from vmoco.train.run_folder import INIT, RunFolder, check_fork, check_init, is_checkpoint, local_copy
from vmoco.train.state import Record, checkpoint_bytes, differences, networks_in
from vmoco.unused_settings import unused_settings

_SLOW_SHARE, _GOOD_SHARE = 0.1, 0.025
"""Parts of a run within which the key encoder follows: more than the first is warned of, the second is advised."""


@dataclass(frozen=True)
class PreparedRun:
    """A run that is checked and has not begun."""

    settings: PretrainSettings
    """With name, storage and data URI resolved."""
    mixture: Mixture
    """Its data sets."""
    folder: str
    """URI of the run's folder."""
    finished: str | None
    """Where its encoder is, if this run has finished: a URI of MLflow, or of a trial's last checkpoint."""
    fitted: tuple[str, ...] = ()
    """What was chosen to fit the data set, one line each."""


@dataclass(frozen=True)
class Run(PreparedRun):
    """A run that has its folder and its MLflow run."""

    run_id: str = ""
    is_new: bool = True
    start: str = ""
    """Which weights of `model.init` it starts from, in words."""
    warning: str = ""
    """What is wrong with the tracker, where the run can begin anyway."""


def prepare(settings: PretrainSettings) -> PreparedRun:
    """Checks everything that can be checked without Ray, and begins nothing.

    Raises:
        ValueError: data or storage cannot be used, or the name belongs to a run with other settings.
    """
    data = absolute(settings.data)
    place = settings.run.storage or storage.join(storage.home(), "runs")
    storage.require_absolute(place, "run.storage")
    now = datetime.datetime.now(tz=datetime.UTC)
    name = settings.run.name or f"{settings.preset}-{now:%Y%m%d-%H%M%S}"
    if "/" in name or name.startswith("."):
        raise ValueError(
            f"--run.name {name!r} is not allowed: it is the name of a folder, so it has no slash and no dot in front"
        )
    begin = storage.absolute_uri(settings.run.fork) if settings.run.fork else None
    resolved = settings.model_copy(
        update={
            "run": settings.run.model_copy(
                update={"name": name, "storage": storage.absolute_uri(place), "fork": begin}
            ),
            "data": data,
        }
    )
    mixture = Mixture.load(resolved.data)
    resolved, fitted = fit_to_data(resolved, mixture)
    mixture = Mixture.of(mixture.manifests, resolved.data.weights)
    check_fits(mixture, resolved)
    folder = storage.join(storage.absolute_uri(place), name)
    storage.check_writable(folder)
    record = RunFolder(folder).read_run()
    if resolved.run.fork and not record:
        check_fork(resolved, mixture.hash)
    if resolved.model.init and not record:
        check_init(resolved)
    if record:
        try:
            before = PretrainSettings(**record["settings"])
        except ValueError as error:
            raise ValueError(
                f"this vmoco cannot read the settings of run {name!r}: {error}. Resume it with the version of vmoco "
                "that began it, or give another --run.name"
            ) from None
        if changed := differences(before, resolved):
            raise ValueError(
                f"--run.name {name!r} belongs to a run with other settings ({changed}): set them as they were to "
                "resume it, or give another --run.name"
            )
        if record["manifest_hash"] != mixture.hash:
            raise ValueError(
                f"--run.name {name!r} belongs to a run on data set {record['manifest_hash']}, {mixture.uri} is "
                f"{mixture.hash}: give --data.uri as it was to resume it, or another --run.name"
            )
    # A finished run continues when its last step is raised.
    ended = record is not None and record.get("finished_step", resolved.train.steps) >= resolved.last_step
    if not ended:
        _checkpoint_space(resolved, folder)
    return PreparedRun(resolved, mixture, folder, record["finished"] if record and ended else None, tuple(fitted))


def _checkpoint_space(settings: PretrainSettings, folder: str) -> str:
    """How much space the checkpoints take, and how much is free, in words.

    Raises:
        ValueError: they do not fit; those that the run has written already need no more.
    """
    size, train = checkpoint_bytes(settings), settings.train
    # One is written before an old one is deleted.
    most = train.keep_checkpoints + train.keep_best + 1
    takes = f"{most} checkpoints at most, {storage.gigabytes(size)} each"
    free = storage.free_bytes(folder)
    if free is None:
        return takes
    need = size * max(1, most - len(RunFolder(folder).steps()))
    if need > free:
        raise ValueError(
            f"--run.storage {settings.run.storage} has {storage.gigabytes(free)} free, and the run needs "
            f"{storage.gigabytes(need)} more: it writes {takes}. Free space, lower --train.keep-checkpoints "
            f"{train.keep_checkpoints} or --train.keep-best {train.keep_best}, or give another --run.storage"
        )
    return f"{takes}; {storage.gigabytes(free)} are free"


def open_run(prepared: PreparedRun, *, parent_run: str | None = None) -> Run:
    """Gives the run its MLflow run: a new one, or the one that it had before it stopped.

    Args:
        prepared: what `prepare` returned.
        parent_run: MLflow run of the sweep that this run is a trial of.

    Raises:
        ValueError: the tracker cannot be used.
    """
    folder = RunFolder(prepared.folder)
    if record := folder.read_run():
        problem = tracking.resume_run(record["run_id"])
        start = record.get("start", "")
        return Run(**vars(prepared), run_id=record["run_id"], is_new=False, start=start, warning=problem)
    settings, mixture = prepared.settings, prepared.mixture
    assert settings.run.name is not None, "`prepare` sets it"
    tags = {"folder": prepared.folder, "manifest_hash": mixture.hash, "preset": settings.preset}
    start = ""
    if settings.model.init:
        start, origin = _copy_weights(settings, folder)
        tags |= origin
    run_id = tracking.create_run(
        settings,
        tags={f"vmoco.{key}": value for key, value in tags.items()},
        data=[tracking.DataInput(each.uri, each.hash, each.counts) for each in mixture.manifests],
        note=metrics.NOTE,
        parent_run=parent_run,
    )
    folder.write_run(
        {
            "run_id": run_id,
            "manifest_hash": mixture.hash,
            "settings": settings.model_dump(mode="json"),
            "finished": None,
        }
        | ({"start": start} if start else {})
    )
    return Run(**vars(prepared), run_id=run_id, is_new=True, start=start)


def run_id_of(prepared: PreparedRun) -> str | None:
    """The MLflow run of a run; None where it has not begun."""
    record = RunFolder(prepared.folder).read_run()
    return record["run_id"] if record else None


def _copy_weights(settings: PretrainSettings, folder: RunFolder) -> tuple[str, dict[str, str]]:
    """Copies the weights of `model.init` into the run's folder: the run does not read `model.init` again.

    Returns:
        What it starts from, in words; and the tags that say it.

    Raises:
        ValueError: there is no such encoder or checkpoint, it is damaged, or it has another network.
    """
    uri = settings.model.init
    assert uri is not None, "the caller checks it"
    if is_checkpoint(uri):
        with local_copy(uri) as checkpoint:
            record, weights = Record.read(checkpoint), networks_in(checkpoint, settings)
            content = safetensors.torch.save(weights)
        kept, fresh = "both encoders with their heads", "the queue, the optimizers and the learning rate"
        if any(name.startswith("generator.") for name in weights):
            kept += ", and the generator"
        else:
            fresh += ", and the generator, because --generator.hidden-channels is another"
        start = f"the checkpoint {uri}, step {record.step}: keeps {kept}; new are {fresh}"
        tags = {"init": uri, "init_step": str(record.step), "init_run_id": str(record.run_id)}
    else:
        encoder = package.load_encoder(uri)
        if encoder.card["backbone"] != settings.model.backbone:
            raise ValueError(
                f"--model.init {uri} is a {encoder.card['backbone']}, --model.backbone is "
                f"{settings.model.backbone}: set --model.backbone to that of the encoder"
            )
        expected, mine = encoder.preprocessing, (settings.data.num_frames, settings.augment.size)
        if settings.architecture.learns_positions and (expected.num_frames, expected.size) != mine:
            raise ValueError(
                f"--model.init {uri} is a {settings.model.backbone}, which has learned the positions of "
                f"{expected.num_frames} frames of {expected.size} pixels, and this run trains on {mine[0]} of "
                f"{mine[1]}: set --data.num-frames {expected.num_frames} and --augment.size {expected.size}"
            )
        content = safetensors.torch.save(encoder.backbone.state_dict())
        start, tags = f"the encoder {uri}", {"init": uri}
    storage.write_atomic(folder.path(INIT), content)
    return start, tags | {"init_sha256": hashlib.sha256(content).hexdigest()}


def close_run(run: Run, encoder: str) -> None:
    """Records that a run has finished and where its encoder is; the same command then has nothing left to do."""
    folder = RunFolder(run.folder)
    record = folder.read_run()
    assert record is not None, "written by `open_run`"
    folder.write_run(record | {"finished": encoder, "finished_step": run.settings.last_step})


def introduce(run: Run) -> list[str]:
    """Lines to print before the first step: where the run is, its size, and warnings."""
    settings, mixture, counts = run.settings, run.mixture, run.mixture.counts
    moco, train = settings.moco, settings.train
    epoch = epoch_clips(settings, mixture)
    peak, workers = train.learning_rate * train.global_batch / REFERENCE_BATCH, settings.scaling.num_workers
    lines = [
        f"run {settings.run.name}: {'new' if run.is_new else 'resumed'}, folder {run.folder}",
        f"tracked as {run.run_id} in {tracking.tracking_uri()}",
        f"data {mixture.uri}: {counts['clips']} clips of {counts['videos']} videos, {counts['held_out']} videos "
        f"held out, hash {mixture.hash}",
        f"{settings.last_step} steps of {train.global_batch} clips, "
        f"{settings.last_step * train.global_batch / epoch:.1f} epochs; "
        f"{_dropping(settings)}; the oldest of {moco.queue_size} keys weighs {_oldest_key(settings)}",
    ]
    warmup = f"warm-up of {train.warmup_steps} steps" if train.warmup_steps else "no warm-up"
    lines.append(
        f"{workers} worker{'s' * (workers != 1)} on {'GPUs' if settings.scaling.use_gpu else 'CPUs'}, for "
        f"{settings.num_micro_batches} micro-batches a step; learning rate {peak:g}, with {warmup}"
    )
    lines += _of_each_set(run)
    lines += _left_out(run)
    lines += run.fitted
    lines.append(f"checkpoints: {_checkpoint_space(settings, run.folder)}")
    if settings.model.init:
        lines.append(f"starts from {run.start or settings.model.init}")
    if settings.run.fork:
        lines.append(f"starts from the training state {settings.run.fork}")
    if settings.evaluation.enabled:
        problems = [problem for each in mixture.manifests if (problem := scoring_problem(each))]
        if len(problems) == len(mixture.manifests):
            lines.append(f"warning: no checkpoint gets a score: {problems[0]}; or train with --evaluation.no-enabled")
        else:
            lines += [f"warning: one data set gets no score: {problem}" for problem in problems]
            lines += _scoring(settings, num_videos=counts["held_out"])
        if settings.evaluation.motion:
            why = [problem for each in mixture.manifests if (problem := motion_problem(each, settings))]
            lines += [f"warning: --evaluation.motion does not measure everything: {problem}" for problem in why]
    if run.warning:
        lines.append(f"warning: {run.warning}")
    problems = [*unused_settings(settings), *window_warnings(settings, mixture), *shot_warnings(settings, mixture)]
    lines += [f"warning: {problem}" for problem in problems]
    if settings.model.backbone in TRANSFORMERS and train.optimizer != "adamw":
        lines.append(
            f"warning: --model.backbone {settings.model.backbone} is a transformer, which learns slowly with "
            f"--train.optimizer {train.optimizer}: set adamw, with a lower --train.learning-rate (vmoco/METHOD.md has "
            "the settings of its paper)"
        )
    if settings.num_micro_batches == 1 and settings.architecture.batch_norm:
        lines.append(
            f"warning: --train.micro-batch {settings.train.micro_batch} is the complete global batch, so a key is "
            "normalised with the same clips as its query, which lets the encoder cheat (MoCo, section 3.3): lower "
            "--train.micro-batch"
        )
    follows = 1 / (1 - moco.momentum)  # steps in which a key encoder comes within 1/e of one that stands still
    if moco.momentum > 0.9 and follows > _SLOW_SHARE * train.steps:
        advised = 1 - min(0.1, float(f"{1 / (_GOOD_SHARE * train.steps):.1g}"))
        lines.append(
            f"warning: with --moco.momentum {moco.momentum:g} the key encoder follows within {follows:,.0f} steps, "
            f"which is {100 * follows / train.steps:.0f}% of this run; in our trials 25% cost 2 to 11 points of a "
            f"linear probe against 2.5%: lower it to about {advised:g} (vmoco/METHOD.md)"
        )
    if moco.queue_size > epoch:
        lines.append(
            f"warning: the queue holds {moco.queue_size / epoch:.1f} epochs, so each video several times. Keys of the "
            "query's own video never count, but a queue below an epoch is cheaper: lower --moco.queue-size"
        )
    return lines


def _dropping(settings: PretrainSettings) -> str:
    """Which frames of a query are dropped, in words."""
    frames = f"{settings.num_dropped} of {settings.data.num_frames} frames"
    if settings.num_dropped and settings.generator_start < settings.train.steps:
        return f"the generator drops {frames} from step {settings.generator_start}"
    if settings.num_dropped and settings.generator.before_start == "random":
        return f"{frames} are dropped at random, without a generator"
    return "no frame is dropped"


def _of_each_set(run: Run) -> list[str]:
    """What a mixture of data sets is made of; nothing for a single one."""
    settings, mixture = run.settings, run.mixture
    if mixture.is_one:
        return []
    draws, lines = settings.last_step * settings.train.global_batch, []
    indexes = mixture.indexes(settings.data)
    for name, weight, manifest, clips in zip(mixture.names, mixture.weights, mixture.manifests, indexes, strict=True):
        frames, height, width, _ = manifest.frame_shape
        passes = weight * draws / (clips.num_videos * settings.data.draws_per_video)
        lines.append(
            f"{name}: {weight:.1%} of the draws, {passes:.1f} epochs of its own; {clips.num_clips} clips of "
            f"{clips.num_videos} videos, {frames} frames of {height}x{width}"
        )
    for shared in shared_videos(mixture):
        text = f"{shared.videos} videos are both in {shared.first.uri} and in {shared.second.uri}, so they count twice"
        if shared.held_out:
            text += f"; {shared.held_out} of them are held out in one of the two, and trained on in neither"
        lines.append(text)
    rates = [Mixture.of(each).fps for each in mixture.manifests]
    if max(rates) > 1.5 * min(rates):
        listed = ", ".join(f"{name} {fps:.4g}" for name, fps in zip(mixture.names, rates, strict=True))
        lines.append(
            f"warning: the data sets have clips of different frame rates ({listed}), so the same movement is faster "
            "in one than in another: ingest them with one --fps if that is not wanted"
        )
    return lines


def _left_out(run: Run) -> list[str]:
    """How many clips the settings leave out of training."""
    settings, mixture, counts = run.settings, run.mixture, run.mixture.counts
    indexes = mixture.indexes(settings.data)
    taken, held_out = sum(each.num_clips for each in indexes), 0
    for manifest in mixture.manifests:
        held_out += sum(int(piece["held_out"].to_numpy().sum()) for piece in manifest.batches(["held_out"]))
    less = counts["clips"] - held_out - taken
    if not less:
        return []
    videos = counts["videos"] - counts["held_out"] - sum(each.num_videos for each in indexes)
    why = reasons(settings.data) + ([] if mixture.is_one else ["what another data set holds out"])
    return [
        f"{less} of {less + taken} clips are left out of training, and with them {videos} complete videos "
        f"({', '.join(why)})"
    ]


def _scoring(settings: PretrainSettings, *, num_videos: int) -> list[str]:
    """How long the score of a checkpoint takes, with a warning where it takes too long."""
    evaluation = settings.evaluation
    seconds = scoring_seconds(settings, num_videos=num_videos)
    gpus = {"gpu": "a GPU", "shared-gpu": "a worker's GPU"}
    where = gpus.get(evaluation.device, f"{max(evaluation.num_cpus, 1)} CPU")
    videos = min(num_videos, evaluation.max_videos)
    duration = f"about {seconds / 60:.0f} min" if seconds >= 60 else "less than a minute"
    lines = [f"each checkpoint is scored on {videos} held-out videos: {duration} on {where}"]
    if seconds > SCORE_SECONDS:
        lines.append(
            f"warning: a score that takes more than {SCORE_SECONDS / 60:.0f} min is cancelled, so checkpoints may have "
            f"no score: lower --evaluation.max-videos {evaluation.max_videos}, raise --evaluation.num-cpus "
            f"{evaluation.num_cpus}, or set --evaluation.device gpu"
        )
    return lines


def _oldest_key(settings: PretrainSettings) -> str:
    """Weight of the oldest key of a full queue at the first and at the last step."""
    moco, train = settings.moco, settings.train
    first, last = (
        oldest_key_weight(
            float(decay_at(step, moco, total_steps=train.steps, difference=torch.zeros(()))),
            queue_size=moco.queue_size,
            global_batch=train.global_batch,
            age_unit=moco.age_unit,
        )
        for step in (0, train.steps - 1)
    )
    if moco.decay_schedule == "adversarial":
        return f"{first:.3f} at first, and less as the generator's choice changes the embeddings more"
    return f"{first:.3f}" if moco.decay_schedule == "constant" else f"{first:.3f} at first and {last:.3f} at the end"
