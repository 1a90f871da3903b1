"""Asks, before a run begins, whether it can go well:

    ray job submit --working-dir . -- python jobs/check.py cluster PRESET --run.storage URI --data.uri URI

`cluster` takes the words and flags of jobs/pretrain.py and asks every node in under a minute: versions, GPUs, clock,
shared memory, storage, tracker; then how long the run would take and what memory it needs. `cluster PRESET --help`
lists the flags. It changes nothing, and exits with 1 where there is a problem.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import tyro

from vmoco import job
from vmoco.config import PretrainSettings
from vmoco.presets import PRESETS

Preset: TypeAlias = tyro.extras.subcommand_type_from_defaults(  # type: ignore[valid-type]
    {name: settings for name, (_, settings) in PRESETS.items()}, {name: about for name, (about, _) in PRESETS.items()}
)


def cluster(settings: Annotated[Preset, tyro.conf.arg(name="")]) -> None:
    """Whether the cluster can carry a run.

    Args:
        settings: of the run.
    """
    job.connect(worker_output=False)
    from vmoco.cluster_check import check_cluster  # not before: Ray reads how to authenticate when it is imported

    assert isinstance(settings, PretrainSettings)
    problems = check_cluster(settings, show=lambda line: print(line, flush=True))
    for problem in problems:
        print(f"problem: {problem}", flush=True)
    if problems:
        raise ValueError(f"the cluster cannot carry this run: {len(problems)} problems, the first: {problems[0]}")
    print("the cluster can carry this run", flush=True)


def main() -> None:
    """Parses the first word and asks what it stands for."""
    app = tyro.extras.SubcommandApp()
    app.command(cluster)
    app.cli(description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))


if __name__ == "__main__":
    job.run_job(main)
