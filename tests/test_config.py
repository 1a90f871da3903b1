"""Settings answer a bad value with a sentence, keep their hash where numbers stay the same, and explain themselves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from vmoco import config
from vmoco.config import PretrainSettings, Settings
from vmoco.job_settings import IngestSettings
from vmoco.presets import PRESETS

ROOT = Path(__file__).parents[1]
TINY = PRESETS["tiny"][1]
GROUPS = {name: type(value) for name, value in TINY if isinstance(value, Settings)}

# What decides no number of a run: its name, where things lie, how often it reports, where it runs.
SILENT = {
    *{("run", name) for name in ("name", "storage")},
    *{("data", name) for name in ("uri", "batches_ahead", "cache", "cache_gib")},
    *{("train", name) for name in ("stop_after", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best")},
    *{(group, name) for group in ("scaling", "evaluation", "tracking") for name in GROUPS[group].model_fields},
}


def changed(settings: PretrainSettings, group: str, **fields: object) -> PretrainSettings:
    """The settings with some fields of a group replaced, checked anew."""
    values = settings.model_dump()
    values[group] |= fields
    return PretrainSettings(**values)


def other_value(group: str, name: str) -> object:
    """A value that is allowed in place of that of `tiny`."""
    needed: dict[tuple[str, str], object] = {
        ("moco", "queue_size"): 128,
        ("train", "global_batch"): 12,
        ("train", "micro_batch"): 2,
        ("train", "stop_after"): 7,
        ("scaling", "num_workers"): 2,
        ("scaling", "min_workers"): 1,
        ("augment", "hue"): 0.1,
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
    ("group", "fields", "said"),
    [
        ("moco", {"queue_size": 7}, r"^moco\.queue-size 7 is below train\.global-batch 8: lower .* or raise"),
        ("train", {"micro_batch": 3}, r"^train\.global-batch 8 is not a multiple of train\.micro-batch 3: change"),
        ("scaling", {"min_workers": 2}, r"^scaling\.min-workers 2 is above scaling\.num-workers 1: lower it, or raise"),
        ("scaling", {"num_workers": 3}, r"^scaling\.num-workers 3 is above the 2 micro-batches .*: lower"),
        ("generator", {"drop_ratio": 0.05}, r"^generator\.drop-ratio 0\.05 of data\.num-frames 8 drops 0 frames: "),
        ("train", {"warmup_steps": 20}, r"^train\.warmup-steps 20 must be below train\.steps 20$"),
        ("train", {"steps": 0}, r"^train.steps 0 is not allowed: .*greater than or equal to 1$"),
        ("moco", {"decay": 1.5}, r"^moco.decay 1\.5 is not allowed: .*less than or equal to 1$"),
        ("moco", {"decay": 0.0}, r"^moco.decay 0\.0 is not allowed: .*greater than 0$"),
        ("moco", {"decay_end": 1.5}, r"^moco.decay-end 1\.5 is not allowed: .*less than or equal to 1$"),
        ("moco", {"decay_schedule": "slow"}, r"^moco.decay-schedule 'slow' is not allowed: .*'linear'.*'adversarial'$"),
        ("moco", {"age_unit": "day"}, r"^moco.age-unit 'day' is not allowed: .*'step' or 'key'$"),
        (
            "generator",
            {"drop_ratio": 0.95},
            r"^generator.drop-ratio 0\.95 is not allowed: .*less than or equal to 0\.9$",
        ),
        (
            "train",
            {"schedule": "linear"},
            r"^train.schedule 'linear' is not allowed: .*'step', 'cosine' or 'constant'$",
        ),
        ("train", {"optimizer": "lion"}, r"^train.optimizer 'lion' is not allowed: .*'sgd' or 'adamw'$"),
        ("train", {"learning_rate": math.inf}, r"^train.learning-rate inf is not allowed: .*finite number$"),
        ("moco", {"decay": math.nan}, r"^moco.decay nan is not allowed: .*finite number$"),
        ("augment", {"blur_probability": 1.5}, r"^augment.blur-probability 1\.5 is not allowed: .*equal to 1$"),
        ("data", {"positives": "three"}, r"^data.positives 'three' is not allowed: .*'same_clip' or 'two_clips'$"),
        ("model", {"embedding_dim": "wide"}, r"^model.embedding-dim 'wide' is not allowed: .*integer"),
        ("augment", {"sise": 3}, r"^augment.sise 3 is not allowed: extra inputs"),
    ],
)
def test_bad_value_is_answered_with_a_sentence(group: str, fields: dict[str, Any], said: str) -> None:
    """The field as it is spelled on the command line, its value and what is allowed, in one line."""
    with pytest.raises(ValueError, match=said) as raised:
        changed(TINY, group, **fields)
    assert "\n" not in str(raised.value)


def test_drop_ratio_must_leave_a_frame() -> None:
    """0.9 of two frames would drop both; 0.5 drops one and is taken, as is 0 for no generator at all."""
    two = changed(changed(TINY, "generator", drop_ratio=0.5), "data", num_frames=2)
    assert two.num_dropped == 1
    assert changed(two, "generator", drop_ratio=0.0).num_dropped == 0
    with pytest.raises(ValueError, match=r"0\.9 of data\.num-frames 2 drops 2 frames: .* one must stay"):
        changed(two, "generator", drop_ratio=0.9)


@pytest.mark.parametrize(("group", "fields"), [("data", {"num_frames": 4}), ("augment", {"size": 16})])
def test_s3d_is_refused_where_nothing_would_be_left_of_a_clip(group: str, fields: dict[str, Any]) -> None:
    """Its last pooling would come to less than one frame or pixel; 5 frames of 17 pixels are taken."""
    small = changed(TINY, "model", backbone="s3d")
    changed(changed(small, "data", num_frames=5), "augment", size=17)
    with pytest.raises(ValueError, match=r"^model\.backbone s3d needs data\.num-frames 5 and augment\.size 17 or more"):
        changed(small, group, **fields)


@pytest.mark.parametrize(
    ("ratio", "frames", "expected"), [(0.25, 8, 2), (0.25, 32, 8), (0.25, 10, 3), (0.3, 8, 2), (0.9, 16, 14)]
)
def test_number_of_dropped_frames_is_the_rounded_share(ratio: float, frames: int, expected: int) -> None:
    """8 of 32 as in the paper; halves round up."""
    assert changed(changed(TINY, "data", num_frames=frames), "generator", drop_ratio=ratio).num_dropped == expected


@pytest.mark.parametrize(
    ("ratio", "percent", "expected"), [(0.25, 50, 10), (0.25, 0, 0), (0.25, 100, 20), (0.25, 51, 11), (0, 0, 20)]
)
def test_generator_starts_after_its_share_of_training(ratio: float, percent: float, expected: int) -> None:
    """The first of 20 steps at or after the share; never where no frame is dropped."""
    assert changed(TINY, "generator", drop_ratio=ratio, start_percent=percent).generator_start == expected


def test_several_bad_values_are_all_named() -> None:
    """One run of the command shows all of them."""
    with pytest.raises(ValueError, match=r"train.steps 0 is not allowed.*; train.global-batch 1 is not allowed"):
        changed(TINY, "train", steps=0, global_batch=1)


def test_settings_are_frozen() -> None:
    """What was hashed and saved cannot change afterwards."""
    with pytest.raises(ValueError, match="frozen"):
        TINY.train.steps = 3  # type: ignore[misc]


FIELDS = [(group, name) for group, kind in GROUPS.items() for name in kind.model_fields]


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=[".".join(field) for field in FIELDS])
def test_hash_follows_what_decides_the_numbers(group: str, name: str) -> None:
    """Seed and every field of the method change the content hash; name, places, reporting and scaling do not."""
    other = changed(TINY, group, **{name: other_value(group, name)})
    assert other != TINY
    assert (other.content_hash() == TINY.content_hash()) == ((group, name) in SILENT)


def test_hash_leaves_out_the_name_of_the_preset() -> None:
    """Two presets with equal settings are one method."""
    assert TINY.model_copy(update={"preset": "other"}).content_hash() == TINY.content_hash()


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


@pytest.mark.parametrize("kind", [IngestSettings, *GROUPS.values()], ids=lambda kind: kind.__name__)
def test_every_field_has_a_sentence(kind: type[Settings]) -> None:
    """A docstring below each field, which is what `--help` shows; the group has one too."""
    assert kind.__doc__
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name} has no docstring"
        assert field.description[0].isupper() or field.description[1] == ":" or name in field.description
        assert field.description.endswith("."), f"{kind.__name__}.{name}: {field.description}"


def test_every_group_belongs_to_a_run() -> None:
    """No class of settings is forgotten by the checks above."""
    kinds = {kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Settings)}
    assert kinds == {Settings, PretrainSettings, *GROUPS.values()}


def run_pretrain(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the job where `import ray` fails."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
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
    """`pretrain.py demo --help` shows each setting by its name, with the sentence below it, and the preset's value."""
    answer = run_pretrain(tmp_path, "demo", "--help")
    assert answer.returncode == 0, answer.stderr
    shown = " ".join(answer.stdout.replace("│", " ").split())
    for group, name in FIELDS:
        assert f" --{group}.{name.replace('_', '-')}" in shown, f"{group}.{name} is not listed"
    assert "K: keys in the queue. (default: 256)" in shown


def test_unknown_flag_is_answered_with_the_nearest(tmp_path: Path) -> None:
    """A slip of the finger ends the job with an error that names the flag that was meant."""
    answer = run_pretrain(tmp_path, "demo", "--moco.queue-sise", "3")
    assert answer.returncode != 0
    assert "--moco.queue-sise" in answer.stderr
    assert "--moco.queue-size" in answer.stderr
