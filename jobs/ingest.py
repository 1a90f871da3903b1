"""Turns a folder of videos into a data set: Arrow shards, a manifest, and a ledger of rejected videos.

On a cluster (every node must reach the paths: a shared folder, s3://, gs://):

    ray job submit --working-dir . -- python jobs/ingest.py --videos URI --output URI

On a laptop, without a cluster:

    python jobs/ingest.py --videos ~/videos --output ~/.vmoco/data/mine

Run the same command again to continue after an interruption or to add new videos; finished work is not repeated.
"""

from __future__ import annotations

from vmoco import job
from vmoco.job_settings import IngestSettings


def main() -> None:
    """Parses the settings, runs the ingest and prints where the data set is."""
    import tyro

    settings = tyro.cli(IngestSettings, description=__doc__)

    from vmoco import storage
    from vmoco.cluster.check import check_nodes
    from vmoco.data.ingest import ingest
    from vmoco.data.source import split_pattern

    job.connect(worker_output=False)
    places = {"--output": storage.require_absolute(settings.output, "--output")}
    places["--videos"], _ = split_pattern(storage.require_absolute(settings.videos, "--videos"))
    check_nodes(places, writes="--output", show=job.show)
    manifest = ingest(settings, progress=job.show)
    counts = manifest.counts
    print(
        f"data set {manifest.uri}: {counts['clips']} clips of {counts['videos']} videos "
        f"({counts['held_out']} held out), {counts['rejected']} rejected, hash {manifest.hash}",
        flush=True,
    )


if __name__ == "__main__":
    job.run_job(main)
