"""Lists the registered encoders, chooses which version of a name is the champion, and finds who was trained on a video.

    python jobs/registry.py list                 # all versions with their aliases and scores
    python jobs/registry.py promote NAME         # the candidate becomes the champion, if it scores better
    python jobs/registry.py promote NAME --version 3 --force "the champion saw a withdrawn video"
    python jobs/registry.py rollback NAME        # restores the previous champion
    python jobs/registry.py saw cats/1.mp4       # encoders trained on a video, for example after it was withdrawn

This job needs no Ray.
"""

from collections.abc import Callable
from typing import Annotated, Any

import tyro

from vmoco import job

Name = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(help="Name of the registered encoder, for example videomoco-kinetics.")
]


def list_encoders() -> None:
    """Prints every registered version with its aliases and scores."""
    from vmoco.encoders import promotion, registry

    found = registry.versions()
    for version in found:
        print(f"models:/{version.name}/{version.version}  {', '.join(sorted(version.aliases)) or '-'}")
        for line in [version.description.partition("\n")[0], *map(str, promotion.scores_of(version))]:
            print(f"    {line}")
    if not found:
        print("nothing is registered yet")


def promote(name: Name, version: str | None = None, protocol: str = "label-free", force: str | None = None) -> None:
    """Makes a version the champion, if it scores better than the champion on the same evaluation set.

    Args:
        version: Number of the version, for example 3. When left out: the candidate.
        protocol: Score to compare, for example label-free or knn.
        force: Makes the version the champion without comparing scores. Give the reason, which is kept with the version.
    """
    from vmoco.encoders import promotion

    move = promotion.promote(name, version=version, protocol=protocol, force_reason=force)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def rollback(name: Name) -> None:
    """Restores the previous champion."""
    from vmoco.encoders import promotion

    move = promotion.rollback(name)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def saw(video: Annotated[str, tyro.conf.Positional]) -> None:
    """Prints the registered encoders that were trained on a video, and those whose data set held it out.

    Args:
        video: Id of the video in the manifest: its path below the ingested folder, for example cats/1.mp4.
    """
    from vmoco.encoders import registry

    found = registry.encoders_that_saw(video)
    for each in found.sightings:
        how = "held out from" if each.held_out else "trained on"
        print(f"{each.uri}  {', '.join(each.aliases) or '-'}  {how} in data {each.manifest_hash}")
    if not found.sightings:
        print(f"no registered encoder saw {video!r}")
    if found.unknown:
        print(f"unknown for {', '.join(found.unknown)}: they have no list of videos (imported weights)")


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_encoders, "promote": promote, "rollback": rollback, "saw": saw}

if __name__ == "__main__":
    job.run_job(lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__))
