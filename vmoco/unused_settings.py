"""Settings of a run that have no effect, because another setting switches off what they belong to.

They are reported at the start of a run and never refused: a run that began with such settings must be able to resume.
Only what the user changed is reported. A value that comes from the preset or from the defaults is not.
"""

from __future__ import annotations

from vmoco.architectures import TRANSFORMERS
from vmoco.config import PretrainSettings
from vmoco.presets import PRESETS
from vmoco.settings import Settings, flag

Reasons = dict[tuple[str, str], str]
"""Why a field has no effect, by group and name."""

_OF_TRAINING = ("strength", "learning_rate", "estimator", "relative", "select", "objective", "every", "clips_percent")
_OF_THE_NETWORK = ("hidden_channels", "frame_size")
_SPEED = ("compile", "compile_generator_steps", "compile_generator", "cudnn_benchmark", "pad_channels")
_PADDED = ("r2plus1d_18", "r2plus1d_nano")
_COLOURS = ("brightness", "contrast", "saturation", "hue")


def unused_settings(settings: PretrainSettings) -> list[str]:
    """One line for each field that the user changed and that has no effect: the flag, the value, and the reason."""
    preset = PRESETS[settings.preset][1] if settings.preset in PRESETS else None
    lines = []
    for (group, name), reason in without_effect(settings).items():
        given: Settings = getattr(settings, group)
        value = getattr(given, name)
        usual = getattr(getattr(preset, group), name) if preset else type(given).model_fields[name].default
        if value != usual:
            lines.append(f"{_typed(group, name, value)} has no effect, because {reason}")
    return lines


def without_effect(settings: PretrainSettings) -> Reasons:
    """All fields without effect, whatever their values are, and why."""
    parts = (_data, _augment, _model, _generator, _moco, _train_and_places)
    return {field: reason for part in parts for field, reason in part(settings).items()}


def _data(settings: PretrainSettings) -> Reasons:
    data, found = settings.data, Reasons()
    if data.two_clips_from_percent and settings.two_clips_start >= settings.train.steps:
        found["data", "positives"] = (
            f"--data.two-clips-from-percent {data.two_clips_from_percent} of --train.steps {settings.train.steps} "
            "leaves no step for it"
        )
    if data.uri and all("://" not in uri or uri.startswith("file://") for uri in data.uri):
        for name in ("cache", "cache_gib"):
            found["data", name] = f"--data.uri {' '.join(data.uri)} is on a local disk, which needs no cache"
    return found


def _augment(settings: PretrainSettings) -> Reasons:
    augment, found = settings.augment, Reasons()
    if augment.grey_probability == 1:
        for name in ("saturation", "hue"):
            found["augment", name] = "--augment.grey-probability 1.0 makes every view grey"
    if augment.jitter_probability == 0:
        for name in _COLOURS:
            found["augment", name] = "--augment.jitter-probability is 0"
    in_use = [name for name in _COLOURS if ("augment", name) not in found]
    if in_use and not any(getattr(augment, name) for name in in_use):
        found["augment", "jitter_probability"] = f"{_flags('augment', in_use)} are 0"
    return found


def _model(settings: PretrainSettings) -> Reasons:
    model, found = settings.model, Reasons()
    if model.backbone not in TRANSFORMERS:
        found["model", "drop_path"] = (
            f"--model.backbone {model.backbone} has no branches that can be left out; {', '.join(TRANSFORMERS)} have"
        )
    return found


def _generator(settings: PretrainSettings) -> Reasons:
    generator, found = settings.generator, Reasons()
    if settings.num_dropped == 0:
        for name in type(generator).model_fields:
            found["generator", name] = "--generator.drop-ratio is 0"
        del found["generator", "drop_ratio"]
        return found
    if settings.generator_start >= settings.train.steps:
        never = f"the generator does not start within --train.steps {settings.train.steps}"
        for name in (*_OF_TRAINING, *_OF_THE_NETWORK):
            found["generator", name] = f"{never} (--generator.start-percent {generator.start_percent})"
        if generator.before_start == "whole":
            for name in ("drop_ratio", "fill"):
                found["generator", name] = f"{never}, and --generator.before-start is whole"
        return found
    if settings.generator_start == 0:
        found["generator", "before_start"] = "the generator starts at the first step (--generator.start-percent)"
    if generator.objective == "contrast":
        for name in ("strength", "clips_percent"):
            found["generator", name] = "--generator.objective is contrast"
    elif settings.train.optimizer == "adamw":
        found["generator", "strength"] = "--train.optimizer is adamw, which divides each gradient by its usual size"
    return found


def _moco(settings: PretrainSettings) -> Reasons:
    moco, found = settings.moco, Reasons()
    schedule, adversary = moco.decay_schedule, settings.generator_start < settings.train.steps
    if schedule == "adversarial":
        found["moco", "decay"] = "--moco.decay-schedule is adversarial"
        if not adversary:
            found["moco", "decay_schedule"] = "the generator never starts, so the decay stays off"
    elif schedule != "constant" and moco.decay == moco.decay_end:
        found["moco", "decay_schedule"] = f"--moco.decay and --moco.decay-end are both {moco.decay}"
    if schedule in ("constant", "adversarial"):
        found["moco", "decay_end"] = f"--moco.decay-schedule is {schedule}"
    off = {"constant": moco.decay == 1, "adversarial": not adversary}
    if off.get(schedule, moco.decay == moco.decay_end == 1):
        for name in ("age_unit", "decay_on"):
            found["moco", name] = "the decay is off"
    return found


def _train_and_places(settings: PretrainSettings) -> Reasons:
    train, scaling, evaluation, found = settings.train, settings.scaling, settings.evaluation, Reasons()
    if train.optimizer == "adamw":
        found["train", "sgd_momentum"] = "--train.optimizer is adamw"
    if train.weight_decay == 0:
        found["train", "weight_decay_on"] = "--train.weight-decay is 0"
    if train.warmup_steps == 1 and train.schedule != "cosine":
        found["train", "warmup_steps"] = "the first step already has the full learning rate"
    if train.stop_after and train.stop_after > train.steps:
        found["train", "stop_after"] = f"the run ends after --train.steps {train.steps}"
    if train.profiled_steps and train.profiled_steps.start >= settings.last_step:
        found["train", "profile_steps"] = f"the run ends after step {settings.last_step}"
    if not scaling.use_gpu and not any(getattr(train, name) for name in _SPEED):
        found["train", "deterministic"] = "CPUs are deterministic already (--scaling.device cpu)"
    found |= _speed(settings)
    if scaling.min_workers == scaling.num_workers:
        found["scaling", "min_workers"] = "it is equal to --scaling.num-workers"
    if scaling.min_workers in (None, scaling.num_workers):
        found["scaling", "resize_seconds"] = "the number of workers is fixed (--scaling.min-workers)"
    if not evaluation.enabled:
        # Not `max_videos`: jobs/register.py reads it from the checkpoint, to score the encoder later.
        for name in ("num_cpus", "device", "motion"):
            found["evaluation", name] = "checkpoints are not scored (--evaluation.no-enabled)"
        found["train", "keep_best"] = "checkpoints have no scores (--evaluation.no-enabled)"
    if settings.tracking.register_as is None:
        found["tracking", "alias"] = "the encoder is not registered (--tracking.register-as)"
    return found


def _speed(settings: PretrainSettings) -> Reasons:
    train, generator, found = settings.train, settings.generator, Reasons()
    if settings.model.backbone not in _PADDED:
        found["train", "pad_channels"] = f"--model.backbone {settings.model.backbone} has no odd numbers of channels"
    if not settings.scaling.use_gpu:
        found["train", "cudnn_benchmark"] = "CPUs do not use cuDNN (--scaling.device cpu)"
    if generator.objective == "contrast" or settings.generator_start >= train.steps:
        found["train", "compile_generator_steps"] = "no step compares two embeddings for the generator"
    if not train.compile:
        for name in ("compile_generator_steps", "compile_generator"):
            found["train", name] = "--train.compile is off"
    if train.deterministic:
        for name in _SPEED:
            found["train", name] = "--train.deterministic switches it off"
    return found


def _typed(group: str, name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(group, name if value else f"no_{name}")
    return f"{flag(group, name)} {value}"


def _flags(group: str, names: list[str]) -> str:
    return ", ".join(flag(group, name) for name in names[:-1]) + " and " + flag(group, names[-1])
