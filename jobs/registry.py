"""Lists the registered encoders, chooses the champion, and finds those that saw a video. Needs no Ray.

python jobs/registry.py list
python jobs/registry.py promote NAME                 # the candidate becomes the champion, if it scores better
python jobs/registry.py promote NAME --version 3 --force "the champion saw a withdrawn video"
python jobs/registry.py rollback NAME                # restores the previous champion
python jobs/registry.py saw VIDEO                    # which encoders were trained on it; for takedowns
"""

from collections.abc import Callable
from typing import Annotated, Any

import tyro

from vmoco import job

Word = Annotated[str, tyro.conf.Positional]


def list_encoders() -> None:
    """Prints every registered version with its aliases and scores."""
    from vmoco.encoders import promotion, registry

    found = registry.versions()
    for version in found:
        print(f"models:/{version.name}/{version.version}  {', '.join(sorted(version.aliases)) or '-'}")
        for line in [version.description, *map(str, promotion.scores_of(version))]:
            print(f"    {line}")
    if not found:
        print("nothing is registered yet")


def promote(name: Word, version: str | None = None, protocol: str = "label-free", force: str | None = None) -> None:
    """Makes a version the champion if it scores better on the same evaluation set.

    Args:
        name: registered name.
        version: its number, such as 3; the candidate when left out.
        protocol: which score decides, such as label-free or knn.
        force: why the scores do not decide; moves the alias without a better score and keeps this reason.
    """
    from vmoco.encoders import promotion

    move = promotion.promote(name, version=version, protocol=protocol, force_reason=force)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def rollback(name: Word) -> None:
    """Restores the previous champion."""
    from vmoco.encoders import promotion

    move = promotion.rollback(name)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def saw(video: Word) -> None:
    """Prints which registered encoders were trained on a video.

    Args:
        video: its id in the manifest, which is its path below the ingested folder, such as cats/1.mp4.
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
