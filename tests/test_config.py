"""Settings name the flag of a bad value, keep their hash where numbers stay the same, and explain themselves."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from vmoco import clip_settings, config, job_settings, places
from vmoco.config import PretrainSettings
from vmoco.job_settings import EmbedSettings, EvaluateSettings, IngestSettings, SweepSettings
from vmoco.presets import PAPER_STEPS, PRESETS
from vmoco.settings import HashedIfSet, OmittedIfDefault, Settings, Unhashed
from vmoco.sweep.space import Space

ROOT = Path(__file__).parents[1]
TINY = PRESETS["tiny"][1]
GROUPS = {name: type(value) for name, value in TINY if isinstance(value, Settings)}

# Settings that change no number of a run: its name, its paths, how often it reports, where it runs.
SILENT = {
    *{("run", name) for name in ("name", "storage")},
    *{("data", name) for name in ("uri", "leave_out", "batches_ahead", "loader_threads", "cache", "cache_gib")},
    *{("train", name) for name in ("stop_after", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best")},
    ("train", "profile_steps"),
    *{(group, name) for group in ("scaling", "evaluation", "tracking") for name in GROUPS[group].model_fields},
}


# Content hash, that of a fork with seed 3, and hash of the canonical JSON, at commit 774a6ea, or when the preset came.
# The canonical JSON of
# `paper` and `recommended` changed once since: their scoring got CPUs and a number of videos that fit (not hashed).
# `demo` changed as a whole, when it became a recipe that learns within minutes.
FROZEN = {
    "tiny": ("350fdbc6add4daff", "2871ae1ed423b42b", "f1d4caf16a3f4550"),
    "demo": ("ce23d94fd3d09233", "ecabceed4e88d8c1", "6cb2dfb46d0fe3ed"),
    "small": ("4fff1024b65140a2", "c8ad92c8537f5afa", "f408900dcce0417d"),
    "paper": ("d9a64f17ec78469d", "3e292b470c1e409a", "5f55850891217dd4"),
    "recommended": ("86beca5a7c3c82fe", "427eba50b2a31552", "495723d5be809c6d"),
}


def changed(settings: PretrainSettings, group: str, **fields: object) -> PretrainSettings:
    """The settings with some fields of a group replaced, checked anew."""
    values = settings.model_dump()
    values[group] |= fields
    return PretrainSettings(**values)


# Settings without which a value is refused, because it would have no effect.
NEEDED = {
    ("data", "two_clips_from_percent"): ("data", {"positives": "two_clips"}),
    ("data", "leave_out_sha256"): ("data", {"leave_out": "a list"}),
    ("data", "weights"): ("data", {"uri": ["a", "b"]}),
}


def other_value(group: str, name: str) -> object:
    """A value that is allowed in place of that of `tiny`."""
    needed: dict[tuple[str, str], object] = {
        ("moco", "queue_size"): 128,
        ("train", "global_batch"): 12,
        ("train", "micro_batch"): 2,
        ("train", "stop_after"): 7,
        ("train", "epochs"): 3.0,
        ("train", "profile_steps"): "3:5",
        ("train", "warmup_percent"): 5.0,
        ("scaling", "num_workers"): 2,
        ("scaling", "min_workers"): 1,
        ("augment", "hue"): 0.1,
        ("data", "max_cuts"): 1,
        ("data", "uri"): "other",
        ("data", "weights"): [0.7, 0.3],
        ("moco", "reversed_negatives_percent"): 50.0,
    }
    if (group, name) in needed:
        return needed[group, name]
    before = getattr(getattr(TINY, group), name)
    allowed = typing.get_args(GROUPS[group].model_fields[name].annotation)
    if allowed and type(None) not in allowed:
        return next(value for value in allowed if value != before)
    if isinstance(before, bool):
        return not before
    if isinstance(before, int):
        return before + 1
    if isinstance(before, float):
        return before * 0.5 if before else 0.25
    return "other"


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("moco", {"queue_size": 7}, "--moco.queue-size 7 is below --train.global-batch 8: lower .* or raise"),
        ("train", {"micro_batch": 3}, "--train.global-batch 8 is not a multiple of --train.micro-batch 3: change"),
        ("scaling", {"min_workers": 2}, "--scaling.min-workers 2 is above --scaling.num-workers 1: lower .* or raise"),
        ("scaling", {"num_workers": 3}, "--scaling.num-workers 3 is above the 2 micro-batches .*: lower"),
        (
            "scaling",
            {"num_workers": 4},
            "--scaling.num-workers 4 is above the 2 .*: give --train.micro-batch 2, or lower",
        ),
        ("generator", {"drop_ratio": 0.05}, "--generator.drop-ratio 0.05 of --data.num-frames 8 drops 0 frames: "),
        ("train", {"warmup_steps": 20}, "--train.warmup-steps 20 is not below --train.steps 20: lower .* or raise"),
        ("train", {"steps": 0}, "--train.steps is missing: give it, or --train.epochs$"),
        ("train", {"steps": -1}, "--train.steps -1 is not allowed: it must be greater than or equal to 0$"),
        ("moco", {"decay": 1.5}, "--moco.decay 1.5 is not allowed: it must be less than or equal to 1$"),
        ("moco", {"decay": 0.0}, "--moco.decay 0.0 is not allowed: it must be greater than 0$"),
        ("moco", {"decay_end": 1.5}, "--moco.decay-end 1.5 is not allowed: it must be less than or equal to 1$"),
        ("moco", {"decay_schedule": "slow"}, "--moco.decay-schedule slow is not allowed: it must be 'constant', .*"),
        ("moco", {"age_unit": "day"}, "--moco.age-unit day is not allowed: it must be 'step' or 'key'$"),
        ("generator", {"drop_ratio": 0.95}, "--generator.drop-ratio 0.95 is not allowed: .*less than or equal to 0.9$"),
        ("train", {"schedule": "linear"}, "--train.schedule linear is not allowed: .*'step', 'cosine' or 'constant'$"),
        ("train", {"optimizer": "lion"}, "--train.optimizer lion is not allowed: it must be 'sgd' or 'adamw'$"),
        ("train", {"learning_rate": math.inf}, "--train.learning-rate inf is not allowed: .*finite number$"),
        ("moco", {"decay": math.nan}, "--moco.decay nan is not allowed: .*finite number$"),
        ("augment", {"blur_probability": 1.5}, "--augment.blur-probability 1.5 is not allowed: .*equal to 1$"),
        ("data", {"positives": "three"}, "--data.positives three is not allowed: .*'same_clip' or 'two_clips'$"),
        (
            "data",
            {"two_clips_from_percent": 30},
            "--data.two-clips-from-percent 30.0 needs --data.positives two_clips, not same_clip: set two_clips, or ",
        ),
        (
            "moco",
            {"reversed_negatives_percent": 12},
            "--moco.reversed-negatives-percent 12.0 of --train.micro-batch 4 reverses 0 clips: raise one of them, or ",
        ),
        ("generator", {"every": 0}, "--generator.every 0 is not allowed: .*greater than or equal to 1$"),
        ("generator", {"clips_percent": 12.0}, "--generator.clips-percent 12.0 of --train.micro-batch 4 is no clip: "),
        ("generator", {"objective": "both"}, "--generator.objective both is not allowed: .*'difference' or 'contrast'"),
        ("data", {"two_clips_from_percent": 101}, "--data.two-clips-from-percent 101 is not allowed: .*equal to 100$"),
        ("model", {"embedding_dim": "very wide"}, "--model.embedding-dim 'very wide' is not allowed: .*integer"),
        ("augment", {"sise": 3}, r"--augment.sise does not exist: did you mean --augment.size\?$"),
        ("tracking", {"alias": "champion"}, "--tracking.alias champion is not allowed, because .*: leave it out"),
    ],
)
def test_bad_value_is_answered_with_its_flag(group: str, fields: dict[str, Any], message: str) -> None:
    """The flag and the value as they are typed, and what is allowed, in one line."""
    with pytest.raises(ValueError, match="^" + message) as raised:
        changed(TINY, group, **fields)
    assert "\n" not in str(raised.value)


def test_missing_and_unknown_settings_are_named_by_their_flags() -> None:
    """This holds also for jobs whose flags have no group, and for a group inside them."""
    with pytest.raises(ValueError, match=r"^--train\.steps is missing: give it, or --train\.epochs$"):
        PretrainSettings(**{"train": {}})
    with pytest.raises(ValueError, match=r"^--videos is missing; --output is missing$"):
        IngestSettings(**{})
    with pytest.raises(ValueError, match=r"^--num-frames 1 is not allowed: it must be greater than or equal to 2$"):
        IngestSettings(videos="a", output="b", num_frames=1)
    with pytest.raises(ValueError, match=r"^--batch-size 0 is not allowed"):
        EmbedSettings(videos="a", output="b", batch_size=0)
    with pytest.raises(ValueError, match=r"^--finetune\.epochs 0 is not allowed"):
        EvaluateSettings(**{"data": "a", "finetune": {"epochs": 0}})
    with pytest.raises(ValueError, match=r"^--protocols magic is not allowed: it must be 'label-free', 'knn'"):
        EvaluateSettings(**{"data": "a", "protocols": ["knn", "magic"]})
    with pytest.raises(ValueError, match=r"^--samples 0 is not allowed"):
        SweepSettings(pretrain=TINY, samples=0)


def test_a_value_in_the_yaml_file_of_a_sweep_is_named_by_its_flag() -> None:
    """`moco.queue_size: [4]` is written with underscores, and found by the flag that sets the same field."""
    space = Space.read({"moco.queue_size": [4], "moco.momentum": [2.0]}, TINY)
    with pytest.raises(ValueError, match=r"^--moco\.queue-size 4 is below --train\.global-batch 8"):
        space.settings({"moco.queue_size": 4})
    with pytest.raises(ValueError, match=r"^--moco\.momentum 2\.0 is not allowed: it must be less than 1$"):
        space.settings({"moco.momentum": 2.0})


@pytest.mark.parametrize("name", GROUPS)
def test_flags_of_a_group_begin_with_its_field(name: str) -> None:
    """`group` is the name that tyro puts before the dot; a job without groups has none."""
    assert GROUPS[name].group == name
    assert PretrainSettings.group == IngestSettings.group == SweepSettings.group == ""
    assert EvaluateSettings.model_fields["finetune"].default.group == "finetune"


def test_drop_ratio_must_leave_a_frame() -> None:
    """0.9 of two frames would drop both; 0.5 drops one and is taken, as is 0 for no generator at all."""
    two = changed(changed(TINY, "generator", drop_ratio=0.5), "data", num_frames=2)
    assert two.num_dropped == 1
    assert changed(two, "generator", drop_ratio=0.0).num_dropped == 0
    with pytest.raises(ValueError, match=r"0\.9 of --data\.num-frames 2 drops 2 frames: .* keep at least one"):
        changed(two, "generator", drop_ratio=0.9)


@pytest.mark.parametrize(("group", "fields"), [("data", {"num_frames": 4}), ("augment", {"size": 16})])
def test_s3d_is_refused_where_nothing_would_be_left_of_a_clip(group: str, fields: dict[str, Any]) -> None:
    """Its last pooling would give less than one frame or pixel; 5 frames of 17 pixels are accepted."""
    small = changed(TINY, "model", backbone="s3d")
    changed(changed(small, "data", num_frames=5), "augment", size=17)
    with pytest.raises(
        ValueError, match=r"^--model\.backbone s3d needs --data\.num-frames 5 or more and --augment\.size 17"
    ):
        changed(small, group, **fields)


@pytest.mark.parametrize(
    ("ratio", "frames", "expected"), [(0.25, 8, 2), (0.25, 32, 8), (0.25, 10, 3), (0.3, 8, 2), (0.9, 16, 14)]
)
def test_number_of_dropped_frames_is_the_rounded_share(ratio: float, frames: int, expected: int) -> None:
    """8 of 32 as in the paper; halves round up."""
    assert changed(changed(TINY, "data", num_frames=frames), "generator", drop_ratio=ratio).num_dropped == expected


@pytest.mark.parametrize(("percent", "expected"), [(0, 0), (12.5, 1), (25, 1), (37.5, 2), (50, 2), (100, 4)])
def test_number_of_reversed_keys_is_the_rounded_share_of_a_micro_batch(percent: float, expected: int) -> None:
    """Of 4 clips; halves round up."""
    assert changed(TINY, "moco", reversed_negatives_percent=percent).num_reversed == expected


@pytest.mark.parametrize(
    ("ratio", "percent", "expected"), [(0.25, 50, 10), (0.25, 0, 0), (0.25, 100, 20), (0.25, 51, 11), (0, 0, 20)]
)
def test_generator_starts_after_its_share_of_training(ratio: float, percent: float, expected: int) -> None:
    """The first of 20 steps at or after the share; never where no frame is dropped."""
    assert changed(TINY, "generator", drop_ratio=ratio, start_percent=percent).generator_start == expected


@pytest.mark.parametrize(
    ("positives", "percent", "expected"),
    [("same_clip", 0, 20), ("two_clips", 0, 0), ("two_clips", 50, 10), ("two_clips", 51, 11), ("two_clips", 100, 20)],
)
def test_two_clips_start_after_their_share_of_training(positives: str, percent: float, expected: int) -> None:
    """The first of 20 steps at or after the share; never with same_clip."""
    assert changed(TINY, "data", positives=positives, two_clips_from_percent=percent).two_clips_start == expected


def test_contrast_is_refused_where_the_decay_needs_the_difference() -> None:
    """The order of both flags does not matter; each alone is accepted."""
    message = r"^--generator\.objective contrast does not measure .*--moco\.decay-schedule adversarial .*: set"
    contrast = changed(TINY, "generator", objective="contrast")
    with pytest.raises(ValueError, match=message):
        changed(contrast, "moco", decay_schedule="adversarial")
    with pytest.raises(ValueError, match=message):
        changed(changed(TINY, "moco", decay_schedule="adversarial"), "generator", objective="contrast")


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 5, 6, 7, 8, 9]), (3, [4, 7]), (9, [4])])
def test_generator_trains_every_nth_step_from_its_start(every: int, expected: list[int]) -> None:
    """It trains in each n-th of 10 steps, from the fifth on; in none if no frame is dropped."""
    settings = changed(changed(TINY, "train", steps=10), "generator", start_percent=40, every=every)
    assert [step for step in range(10) if settings.trains_generator(step)] == expected
    assert not any(changed(settings, "generator", drop_ratio=0).trains_generator(step) for step in range(10))


def test_several_bad_values_are_all_named() -> None:
    """One start of the command shows all of them."""
    with pytest.raises(ValueError, match=r"--train\.steps -1 is not allowed.*; --train\.global-batch 1 is not allowed"):
        changed(TINY, "train", steps=-1, global_batch=1)


def test_settings_from_before_the_device_are_read() -> None:
    """Runs and encoders of version 0.1 have `use_gpu`."""
    values = TINY.model_dump()
    for use_gpu in (False, True):
        values["scaling"] = {"num_workers": 2, "use_gpu": use_gpu}
        scaling = PretrainSettings(**values).scaling
        assert (scaling.use_gpu, scaling.device) == (use_gpu, "gpu" if use_gpu else "cpu")


def test_settings_are_frozen() -> None:
    """What was hashed and saved cannot change afterwards."""
    with pytest.raises(ValueError, match="frozen"):
        TINY.train.steps = 3  # type: ignore[misc]


FIELDS = [(group, name) for group, kind in GROUPS.items() for name in kind.model_fields]


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=[".".join(field) for field in FIELDS])
def test_hash_follows_what_decides_the_numbers(group: str, name: str) -> None:
    """Seed and every field of the method change the content hash; name, places, reporting and scaling do not."""
    needed_group, fields = NEEDED.get((group, name), (group, {}))
    base = changed(TINY, needed_group, **fields)
    other = changed(base, group, **{name: other_value(group, name)})
    assert other != base
    assert (other.content_hash() == base.content_hash()) == ((group, name) in SILENT)


def test_hash_leaves_out_the_name_of_the_preset() -> None:
    """Two presets with equal settings are one method."""
    assert TINY.model_copy(update={"preset": "other"}).content_hash() == TINY.content_hash()


def test_a_new_field_decides_numbers_unless_it_is_marked() -> None:
    """A field without a mark is part of the content; a mark on a field or on a group takes it out."""

    class Group(Settings):
        forgotten: int = 1
        silent: Annotated[int, Unhashed] = Field(2, ge=0)
        later: Annotated[str | None, HashedIfSet] = None

    class Job(Settings):
        counted: Group = Group()
        left_out: Annotated[Group, Unhashed] = Group()

    assert Job().content() == {"counted": {"forgotten": 1}}
    assert Job(counted=Group(later="x")).content() == {"counted": {"forgotten": 1, "later": "x"}}
    assert Job(counted=Group(silent=3), left_out=Group(forgotten=4)).content_hash() == Job().content_hash()
    assert Job(counted=Group(forgotten=4)).content_hash() != Job().content_hash()


def test_an_option_that_came_later_is_written_only_where_it_is_used() -> None:
    """Content and JSON are those of a class without the option while it has its default; JSON without it is read."""

    class Before(Settings):
        old: int = 1

    class Later(Settings):
        old: int = 1
        option: Annotated[float, OmittedIfDefault] = Field(0.5, ge=0)

    class Job(Settings):
        inner: Later = Later()

    assert Later().canonical_json() == Before().canonical_json() == Later(option=0.5).canonical_json()
    assert Later().content_hash() == Before().content_hash()
    assert json.loads(Job(inner=Later(option=0)).canonical_json()) == {"inner": {"old": 1, "option": 0}}
    assert Job(inner=Later(option=0)).content() == {"inner": {"old": 1, "option": 0}}
    assert Later.model_validate_json(Later().canonical_json()) == Later()


# What these presets leave to the data set: for Kinetics-400, `small` for 90 videos.
FITTED = {
    "small": {"steps": 1125, "epochs": None, "warmup_steps": 56, "warmup_percent": None},
    "demo": {"warmup_steps": 20, "warmup_percent": None},
    "recommended": {"steps": PAPER_STEPS, "epochs": None, "warmup_steps": 4687, "warmup_percent": None},
}


@pytest.mark.parametrize(("name", "frozen"), FROZEN.items())
def test_settings_of_presets_are_written_as_ever(name: str, frozen: tuple[str, str, str]) -> None:
    """Content hash, with and without a fork, and canonical JSON, as checkpoints and MLflow already hold them."""
    settings = changed(PRESETS[name][1], "train", **FITTED.get(name, {}))
    forked = changed(settings, "run", fork="/a", seed=3)
    text = hashlib.sha256(settings.canonical_json().encode()).hexdigest()[:16]
    assert (settings.content_hash(), forked.content_hash(), text) == frozen


@pytest.mark.parametrize(
    ("fields", "frozen"),
    [
        ({}, "375ab9413a81bec4"),
        ({"encoding": "jpeg"}, "92c8c8ae70076f3d"),
        ({"short_side": 100, "fps": 5.0}, "9441535aa0abd49e"),
        ({"height": 100, "width": 133, "fps": 5.0}, "9441535aa0abd49e"),
        ({"jpeg_quality": 50, "shard_megabytes": 7, "annotations": "a.csv", "duplicates": "keep"}, "375ab9413a81bec4"),
    ],
)
def test_settings_of_a_data_set_are_written_as_ever(fields: dict[str, Any], frozen: str) -> None:
    """Existing manifests and shards keep their hash: how a size was given, and what changes no clip, do not count."""
    assert IngestSettings(videos="a", output="b", **fields).content_hash() == frozen


@pytest.mark.parametrize("name", PRESETS)
def test_canonical_json_round_trips(name: str) -> None:
    """Read back, the settings are equal and give equal bytes, also from JSON with its keys in another order."""
    settings = PRESETS[name][1]
    text = settings.canonical_json()
    read = PretrainSettings.model_validate_json(text)
    assert read == settings
    assert read.canonical_json() == text
    backwards = dict(reversed(json.loads(text).items()))
    assert list(backwards) != list(json.loads(text))
    assert PretrainSettings(**backwards).canonical_json() == text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_know_their_name(name: str) -> None:
    """Checked anew field by field, a preset is taken as it is; its description is a sentence."""
    description, settings = PRESETS[name]
    assert PretrainSettings(**settings.model_dump()) == settings
    assert settings.preset == name
    assert description.endswith(".")


KINDS = [
    kind
    for module in (clip_settings, config, job_settings, places)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Settings) and kind.__module__ == module.__name__
]


def test_every_class_of_settings_is_read() -> None:
    """No class of settings is forgotten by the check below."""
    assert {*GROUPS.values(), PretrainSettings, IngestSettings, EmbedSettings, EvaluateSettings} < set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_explained(kind: type[Settings]) -> None:
    """The text below a field, which `--help` shows, has sentences of at most 220 characters; a class has a text too."""
    assert (kind.__doc__ or "").strip().endswith(".")
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Settings) or (
            isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
        ):
            continue  # a group: its class has the text
        text = field.description or ""
        assert text.endswith("."), f"{kind.__name__}.{name}: {text!r}"
        assert text[0].isupper(), f"{kind.__name__}.{name}: {text!r}"
        assert "\n" not in text, "the help breaks lines itself"
        assert len(text) <= 220, f"{kind.__name__}.{name} has {len(text)} characters"


def run_pretrain(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the job where `import ray` fails."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "jobs/pretrain.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_lists_every_field_without_ray(tmp_path: Path) -> None:
    """`pretrain.py demo --help` shows each setting by its name, with its explanation, and the value of the preset."""
    answer = run_pretrain(tmp_path, "demo", "--help")
    assert answer.returncode == 0, answer.stderr
    shown = " ".join(answer.stdout.replace("│", " ").split())
    for group, name in FIELDS:
        assert f" --{group}.{name.replace('_', '-')}" in shown, f"{group}.{name} is not listed"
    assert "K: number of negative keys in the queue." in shown
    assert "(default: 256)" in shown


def test_unknown_flag_is_answered_with_the_nearest(tmp_path: Path) -> None:
    """A mistyped flag ends the job with an error that names the right flag."""
    answer = run_pretrain(tmp_path, "demo", "--moco.queue-sise", "3")
    assert answer.returncode != 0
    assert "--moco.queue-sise" in answer.stderr
    assert "--moco.queue-size" in answer.stderr
