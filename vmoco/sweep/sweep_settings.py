"""The settings of `jobs/sweep.py`: what is tried, how it is chosen, and the pretraining that every trial is."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field

from vmoco.config import PretrainSettings
from vmoco.presets import PRESETS
from vmoco.settings import Settings

Metric = Literal["retrieval", "effective_rank", "knn"]


class SweepSettings(Settings):
    """A sweep over settings of a pretraining."""

    space: str = "ratio-decay"
    """What is tried: ratio-decay (drop ratio x kind of decay), or a YAML file of dotted fields and their values."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """Every combination, or `samples` of them: drawn at random, or by Optuna, which learns from the scores."""
    samples: int = Field(16, ge=1)
    """Trials of a search that is not a grid; a sweep that is submitted again with more goes on with more."""
    metric: Metric = "retrieval"
    """The score that chooses, higher is better; knn needs labels."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Train every trial to its end; or stop the worse ones early at 1/3, 1/9, ... of their steps; or train a population
    of `samples` whose worst copy the best every pbt-steps and change its settings: what wins is a schedule of them."""
    asha_grace_steps: int = Field(100, ge=1)
    """With asha: steps that each trial gets in any case; scores come at checkpoints, train.checkpoint-every apart."""
    pbt_steps: int = Field(100, ge=1)
    """With pbt: steps of a generation; each begins new runs, so some minutes of training at least."""
    max_concurrent: int = Field(0, ge=0)
    """Trials at once; 0 is as many as the cluster holds."""
    table_seconds: float = Field(30.0, ge=0)
    """Least time between two tables of the trials in the log."""
    pretrain: Annotated[PretrainSettings, tyro.conf.arg(name="")]
    """The pretraining; run.name names the sweep, tracking.register-as its best encoder."""


SWEEPS = {name: (about, SweepSettings(pretrain=settings)) for name, (about, settings) in PRESETS.items()}
"""The presets of `jobs/pretrain.py`, to start a sweep from."""
