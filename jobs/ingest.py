"""Turns a folder of videos into a data set: Arrow shards, a manifest, and a ledger of rejected videos.

On a cluster (every node must reach the paths: a shared folder, s3://, gs://):

    ray job submit --working-dir . -- python jobs/ingest.py --videos URI --output URI

On a laptop, without a cluster:

    python jobs/ingest.py --videos ~/videos --output ~/.vmoco/data/mine

Run the same command again to continue after an interruption or to add new videos; finished work is not repeated.

Lists of videos (--annotations), by --layout, each with an example line:

    table      CSV, Parquet or JSON lines with columns    path,start_seconds,end_seconds,label,video_id,split,group
    filelist   path, path label, path start end label     run/a.mp4 3          run/a.mp4,2.5,9,run         file;class
    kinetics   Kinetics 400, 600, 700 as CSV or text      label,youtube_id,time_start,time_end,split
    ssv2       JSON, with labels.json beside it           [{"id": "78687", "template": "Holding [something]"}]
    ucf101     folder with trainlist01.txt and others     Archery/v_Archery_g01_c01.avi 3
    hmdb51     folder with run_test_split1.txt and others clip.avi 1
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
