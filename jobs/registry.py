"""The registered encoders: what there is, which one is the champion, and which have seen a video. Needs no Ray.

python jobs/registry.py list
python jobs/registry.py promote NAME                 # the candidate becomes the champion, if it scores better
python jobs/registry.py promote NAME --version 3 --force "the champion was trained on videos that had to go"
python jobs/registry.py rollback NAME                # the champion before is the champion again
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
    """Makes a version the champion, if it scores better on the same evaluation set.

    Args:
        name: registered name.
        version: its number; the candidate when left out.
        protocol: which score decides.
        force: moves it whatever the scores say; the reason is kept.
    """
    from vmoco.encoders import promotion

    move = promotion.promote(name, version=version, protocol=protocol, force_reason=force)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def rollback(name: Word) -> None:
    """Makes the champion before the champion again."""
    from vmoco.encoders import promotion

    move = promotion.rollback(name)
    print(f"models:/{name}@champion is version {move.version} ({move.reason})")


def saw(video: Word) -> None:
    """Prints which registered encoders were trained on a video.

    Args:
        video: its id in the manifest: the path below the folder that was ingested.
    """
    from vmoco.encoders import registry

    found = registry.encoders_that_saw(video)
    for each in found.sightings:
        how = "held out from" if each.held_out else "trained on"
        print(f"{each.uri}  {', '.join(each.aliases) or '-'}  {how} in data {each.manifest_hash}")
    if not found.sightings:
        print(f"no registered encoder saw {video!r}")
    if found.unknown:
        print(f"not known of {', '.join(found.unknown)}: imported weights")


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_encoders, "promote": promote, "rollback": rollback, "saw": saw}

if __name__ == "__main__":
    job.run_job(lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__))
