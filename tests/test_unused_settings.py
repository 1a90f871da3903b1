"""A setting that has no effect is reported, and what is reported really has none: training gives the same bits."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.config import PretrainSettings, SpeedSwitch
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.settings import Settings, flag
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep
from vmoco.unused_settings import unused_settings, without_effect

Groups = dict[str, dict[str, Any]]

NUM_STEPS = 4
# The generator starts at the third of 4 steps, and its size is that of the defaults.
BASE = changed(
    PRESETS["tiny"][1],
    generator={"before_start": "random", "hidden_channels": 16, "frame_size": 32},
    moco={"decay": 0.9},
    train={"steps": NUM_STEPS, "sgd_momentum": 0.5},
).model_copy(update={"preset": "custom"})
GROUPS = {name: type(value) for name, value in BASE if isinstance(value, Settings)}

OF_THE_GENERATOR: dict[str, Any] = {
    "strength": 7.0,
    "learning_rate": 0.5,
    "estimator": "pixel_sum",
    "relative": True,
    "select": "sample",
    "objective": "contrast",
    "every": 3,
    "clips_percent": 50.0,
    "hidden_channels": 5,
    "frame_size": 11,
}
OF_DROPPING: dict[str, Any] = {"fill": "zero", "start_percent": 25.0, "before_start": "random", **OF_THE_GENERATOR}
OF_DECAY: Groups = {"moco": {"age_unit": "key", "decay_on": "exp"}}

# What switches settings off, and all that it switches off, at values that differ from the defaults.
CASES: dict[str, tuple[Groups, Groups]] = {
    "nothing dropped": ({"generator": {"drop_ratio": 0.0}}, {"generator": OF_DROPPING}),
    "generator never starts": (
        {"generator": {"start_percent": 100.0, "before_start": "whole"}},
        {"generator": {"drop_ratio": 0.5, "fill": "zero", **OF_THE_GENERATOR}},
    ),
    "random frames only": ({"generator": {"start_percent": 80.0}}, {"generator": OF_THE_GENERATOR}),
    "generator starts at once": (
        {"generator": {"start_percent": 0.0, "before_start": "whole"}},
        {"generator": {"before_start": "random"}},
    ),
    "contrast": ({"generator": {"objective": "contrast"}}, {"generator": {"strength": 7.0, "clips_percent": 50.0}}),
    "adamw": (
        {"train": {"optimizer": "adamw"}},
        {"train": {"sgd_momentum": 0.3}, "generator": {"strength": 50.0}},
    ),
    "no branches to leave out": ({}, {"model": {"drop_path": 0.3}}),
    "no weight decay": ({"train": {"weight_decay": 0.0}}, {"train": {"weight_decay_on": "weights"}}),
    "constant decay": ({}, {"moco": {"decay_end": 0.5}}),
    "adversarial decay": (
        {"moco": {"decay_schedule": "adversarial"}},
        {"moco": {"decay": 0.5, "decay_end": 0.5}},
    ),
    "flat schedule of the decay": ({"moco": {"decay_end": 0.9}}, {"moco": {"decay_schedule": "linear"}}),
    "no decay": ({"moco": {"decay": 1.0}}, OF_DECAY),
    "no decay, by schedule": (
        {"moco": {"decay": 1.0}},
        {"moco": {"decay_schedule": "cosine", "age_unit": "key", "decay_on": "exp"}},
    ),
    "no decay, without an adversary": (
        {"moco": {"decay": 1.0}, "generator": {"start_percent": 100.0}},
        {"moco": {"decay_schedule": "adversarial", "decay": 1.0, "age_unit": "key", "decay_on": "exp"}},
    ),
    "grey": ({"augment": {"grey_probability": 1.0}}, {"augment": {"saturation": 0.1, "hue": 0.1}}),
    "no jitter": (
        {"augment": {"jitter_probability": 0.0}},
        {"augment": {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1}},
    ),
    "jitter by nothing": (
        {"augment": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}},
        {"augment": {"jitter_probability": 0.3}},
    ),
    "two clips after the end": (
        {"data": {"positives": "same_clip"}},
        {"data": {"positives": "two_clips", "two_clips_from_percent": 80.0}},
    ),
    "warm-up of one step": ({}, {"train": {"warmup_steps": 1}}),
    "local data": ({}, {"data": {"cache": "/nowhere", "cache_gib": 3.0}}),
    "CPUs": ({}, {"train": {"deterministic": True}}),
    "CPUs without cuDNN": ({}, {"train": {"cudnn_benchmark": True}}),
    "nothing compiled": ({}, {"train": {"compile_generator_steps": True, "compile_generator": True}}),
    "no odd channels": ({}, {"train": {"pad_channels": True}}),
    "deterministic": (
        {"train": {"deterministic": True}, "model": {"backbone": "r2plus1d_nano"}, "scaling": {"device": "gpu"}},
        {"train": dict.fromkeys(get_args(SpeedSwitch), True)},
    ),
    "stop after the end": ({}, {"train": {"stop_after": 5}}),
    "profile after the end": ({"train": {"stop_after": 3}}, {"train": {"profile_steps": "3:4"}}),
    "workers not elastic": ({"scaling": {"num_workers": 2}}, {"scaling": {"min_workers": 2, "resize_seconds": 5.0}}),
    "no evaluation": (
        {"evaluation": {"enabled": False}},
        {"evaluation": {"num_cpus": 3, "device": "gpu", "motion": True}, "train": {"keep_best": 4}},
    ),
    "not registered": ({"tracking": {"register_as": None}}, {"tracking": {"alias": "best-of-march"}}),
}
# It is what makes a setting of its case unused, and is in use itself.
IN_USE = {("data", "two_clips_from_percent")}

# Fields that always have an effect. A new field belongs here or into a case.
ALWAYS = {
    "run": {"name", "storage", "fork", "seed"},
    "data": {
        *(
            "uri",
            "weights",
            "num_frames",
            "stride",
            "draws_per_video",
            "shuffle_window",
            "two_clips_from_percent",
            "batches_ahead",
        ),
        *(
            "loader_threads",
            "leave_out",
            "leave_out_sha256",
            "min_motion",
            "min_brightness",
            "min_contrast",
            "max_cuts",
        ),
    },
    "augment": {"size", "min_area", "grey_probability", "blur_probability", "flip_probability", "standardise"},
    "model": {"backbone", "embedding_dim", "head", "init"},
    "moco": {"queue_size", "momentum", "temperature", "reversed_negatives_percent"},
    "train": {
        *(
            "steps",
            "epochs",
            "warmup_percent",
            "global_batch",
            "micro_batch",
            "learning_rate",
            "weight_decay",
            "clip_gradient_norm",
            "optimizer",
            "schedule",
        ),
        *("precision", "log_every", "checkpoint_every", "keep_checkpoints"),
    },
    "scaling": {"num_workers", "device", "cpus_per_worker", "max_failures", "wait_for_nodes"},
    "evaluation": {"enabled", "max_videos"},
    "tracking": {"experiment", "register_as", "data_licence"},
}


def fields_of(groups: Groups) -> set[tuple[str, str]]:
    return {(group, name) for group, fields in groups.items() for name in fields}


def test_every_field_was_thought_about() -> None:
    """Each is switched off by a case, or always has an effect; none is both."""
    every = {(group, name) for group, kind in GROUPS.items() for name in kind.model_fields}
    always = {(group, name) for group, names in ALWAYS.items() for name in names}
    by_case = {field for _, unused in CASES.values() for field in fields_of(unused)} - IN_USE
    assert always | by_case == every
    assert not always & by_case


def trained(settings: PretrainSettings, manifest: Manifest) -> dict[str, torch.Tensor]:
    """What a run learns: encoders, optimizer and queue, without the generator and what belongs to it."""
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    for number in range(NUM_STEPS):
        step(loader.batch(number))
    return {name: tensor for name, tensor in state.tensors().items() if "generator" not in name}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("case", CASES)
def test_what_is_reported_has_no_effect(case: str, manifest: Manifest) -> None:
    """Each unused field is one line with the flag as typed and a reason. Four steps with and without give one result.

    Bit for bit; under AdamW lambda leaves a rounding. Fields that stay at their defaults are not reported.
    """
    switch, unused = CASES[case]
    off = changed(changed(BASE, data={"uri": manifest.uri}), **switch)
    both = off
    for group, fields in unused.items():
        both = changed(both, **{group: fields})
    reported = unused_settings(both)
    expected = fields_of(unused) - IN_USE
    for group, name in expected:
        value = unused[group][name]
        typed = flag(group, name) + ("" if value is True else f" {value}")
        assert sum(line.startswith(f"{typed} has no effect, because ") for line in reported) == 1, (typed, reported)
    assert len(reported) == len(expected), reported
    assert all("\n" not in line for line in reported)

    if both.content_hash() == off.content_hash():
        return  # places and reports, which no training reads
    before, after = trained(off, manifest), trained(both, manifest)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        limit = 1e-4 if case == "adamw" else 0.0
        torch.testing.assert_close(after[name], tensor, rtol=limit, atol=limit, msg=f"{name} of {case}")


def test_settings_in_use_are_not_reported() -> None:
    """Each field of a case, without the switch of the case, where something else does not switch it off."""
    active: Groups = {
        "generator": OF_DROPPING | {"objective": "difference"},
        "moco": {"decay_schedule": "linear", "decay_end": 0.5, "age_unit": "key", "decay_on": "exp"},
        "augment": {"saturation": 0.1, "hue": 0.1, "brightness": 0.1, "contrast": 0.1, "jitter_probability": 0.3},
        "data": {"uri": "s3://bucket/data", "positives": "two_clips", "cache": "/fast", "cache_gib": 3.0},
        "train": {"warmup_steps": 2, "stop_after": 3, "keep_best": 4, **dict.fromkeys(get_args(SpeedSwitch), True)},
        "model": {"backbone": "r2plus1d_nano"},
        "scaling": {"num_workers": 2, "min_workers": 1, "resize_seconds": 5.0, "device": "gpu"},
        "evaluation": {"num_cpus": 3, "device": "gpu"},
        "tracking": {"register_as": "mine", "alias": "best-of-march"},
    }
    # No network has both odd channels to pad and branches to leave out.
    assert set(without_effect(changed(BASE, **active))) == {("model", "drop_path")}
    swin = changed(BASE, **active | {"model": {"backbone": "swin3d_t", "drop_path": 0.1}})
    assert set(without_effect(swin)) == {("train", "pad_channels")}
    # AdamW itself switches off two fields alone.
    adamw = changed(BASE, **active | {"train": {"optimizer": "adamw", "compile": True}})
    assert set(without_effect(adamw)) == {("model", "drop_path"), ("train", "sgd_momentum"), ("generator", "strength")}
    # On CPUs too, the deterministic mode switches off what is on.
    compiled = changed(BASE, train={"deterministic": True, "compile": True})
    assert {("train", "compile")} == set(without_effect(compiled)) & {("train", "compile"), ("train", "deterministic")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reports_nothing_of_its_own(name: str) -> None:
    """A value that comes from the preset is not reported, also where a flag switches it off; one typed beside it is."""
    assert unused_settings(PRESETS[name][1]) == []
    off = changed(PRESETS[name][1], generator={"drop_ratio": 0.0})
    assert unused_settings(off) == []
    (line,) = unused_settings(changed(off, generator={"every": 4}))
    assert line == "--generator.every 4 has no effect, because --generator.drop-ratio is 0"
