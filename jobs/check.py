"""Checks a data set or a cluster before a long job uses it.

Check a data set, that is every checksum, the counts, and whether every clip can be decoded:

    python jobs/check.py data ~/.vmoco/data/mine

Check a large data set in an object store on a machine near the store:

    ray job submit --working-dir . -- python jobs/check.py data s3://bucket/data

Check a cluster for a pretraining, with the preset and the flags of jobs/pretrain.py (`cluster PRESET --help` lists
them). The check takes less than a minute. It compares the versions, GPUs, clock, shared memory, storage and tracker of
all nodes, and estimates how long the run takes:

    ray job submit --working-dir . -- python jobs/check.py cluster recommended --run.storage URI --data.uri URI

The checks repair nothing. If something is wrong they print what, and end with exit code 1.
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


def data(uri: Annotated[str, tyro.conf.Positional], /) -> None:
    """Checks a data set: every checksum, the counts, and that every clip can be decoded.

    Args:
        uri: Folder or URI (file://, s3://, gs://) of the data set.
    """
    from vmoco import storage
    from vmoco.data.check import check

    uri = storage.require_absolute(uri, "URI")
    findings = check(uri, progress=job.show)
    for finding in findings:
        job.show(finding)
    if findings:
        raise ValueError(
            f"data set {uri} has {len(findings)} errors, listed above: restore its files, or remove its manifest and "
            "run jobs/ingest.py again, which repeats only the missing and damaged shards"
        )
    job.show(f"data set {uri} is complete")


def cluster(settings: Annotated[Preset, tyro.conf.arg(name="")]) -> None:
    """Checks whether a cluster can run a pretraining, and estimates how long it takes."""
    job.connect(worker_output=False)
    from vmoco.cluster.check import check_cluster  # not before: Ray reads how to authenticate when it is imported

    assert isinstance(settings, PretrainSettings)
    problems = check_cluster(settings, show=job.show)
    for problem in problems:
        job.show(f"problem: {problem}")
    if problems:
        raise ValueError(f"the cluster is not ready for this run: {len(problems)} problems, the first: {problems[0]}")
    job.show("the cluster is ready for this run")


def main() -> None:
    """Parses the command line and runs the check."""
    app = tyro.extras.SubcommandApp()
    app.command(data)
    app.command(cluster)
    app.cli(description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))


if __name__ == "__main__":
    job.run_job(main)
