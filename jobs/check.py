"""Checks what jobs are given, before they run for hours.

    python jobs/check.py data URI        a data set: every checksum, the counts, and that every clip can be decoded

It reads everything once, repairs nothing, names what is wrong, and then ends with exit code 1. Large data sets on a
store are checked where the store is near:

    ray job submit --working-dir . -- python jobs/check.py data s3://bucket/set
"""

from __future__ import annotations

import functools
from typing import Annotated

import tyro

from vmoco.job import run_job


def data(uri: Annotated[str, tyro.conf.Positional], /) -> None:
    """Checks a data set: every checksum, the counts, and that every clip can be decoded.

    Args:
        uri: Folder or URI (file://, s3://, gs://) of the data set.
    """
    from vmoco import storage
    from vmoco.data.check import check

    uri = storage.require_absolute(uri, "URI")
    findings = check(uri, progress=functools.partial(print, flush=True))
    for finding in findings:
        print(finding, flush=True)
    if findings:
        raise ValueError(
            f"{len(findings)} things are wrong with data set {uri}, named above: bring back what was written, or "
            "remove its manifest and run jobs/ingest.py again, which makes anew only shards that are not whole"
        )
    print(f"data set {uri} is whole", flush=True)


def main() -> None:
    """Parses which check is asked for, and runs it."""
    tyro.extras.subcommand_cli_from_dict({"data": data}, description=__doc__)


if __name__ == "__main__":
    run_job(main)
