"""Scores of registered encoders, and the alias "champion", which moves only to a better one.

A score is a tag of a version, one for each protocol and evaluation set (a hash of its clips), so two versions are
compared only on the same clips. A tag of the registered name lists each move of the champion with its reason; a
rollback restores the previous champion from that list.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmoco import tracking
from vmoco.encoders import model_page, registry
from vmoco.encoders.registry import CANDIDATE, CHAMPION

LABEL_FREE = "label-free"
_SCORE_TAG, _HISTORY_TAG = "vmoco.score", "vmoco.champions"
_KEPT_MOVES, _REASON_LENGTH = 12, 300  # a tag of MLflow holds 5,000 characters


@dataclass(frozen=True)
class Score:
    """A measured score of an encoder."""

    protocol: str
    """What was measured, such as label-free or knn."""
    evaluation_set: str
    """Hash of the clips and of the way it was measured."""
    value: float
    low: float
    high: float
    """`low` to `high` is the 95 % interval over videos."""
    beside: str
    """Values to compare it with, such as chance, as text."""

    def row(self) -> dict[str, Any]:
        """As an entry of the encoder's card."""
        return {**asdict(self), "set": self.evaluation_set}

    def __str__(self) -> str:
        return f"{self.protocol} {self.value:.1%} [{self.low:.1%}, {self.high:.1%}] on {self.evaluation_set}"


@dataclass(frozen=True)
class Move:
    """One move of the alias "champion"."""

    version: str
    since: str
    """UTC, ISO 8601."""
    reason: str


def record(uri: str, scores: Sequence[Score]) -> None:
    """Adds scores to a registered version; a score replaces the older one of its protocol and evaluation set.

    Raises:
        ValueError: there is no such version.
    """
    version = registry.find_version(uri)
    tracker = tracking.client()
    for score in scores:
        # MLflow takes no @ in the name of a tag; the protocol's own name is in the value.
        key = f"{_SCORE_TAG}.{score.protocol.replace('@', '-at-')}.{score.evaluation_set}"
        tracker.set_model_version_tag(version.name, version.version, key, json.dumps(asdict(score), sort_keys=True))
    if scores:
        known = scores_of(tracker.get_model_version(version.name, version.version))
        model_page.show_scores(version.name, str(version.version), [asdict(score) for score in known])


def scores_of(version: Any) -> list[Score]:
    """The scores of MLflow's entry of a version."""
    return [
        Score(**json.loads(value)) for key, value in sorted(version.tags.items()) if key.startswith(f"{_SCORE_TAG}.")
    ]


def promote(
    name: str, *, version: str | None = None, protocol: str = LABEL_FREE, force_reason: str | None = None
) -> Move:
    """Makes a version the champion if it scores better than the present champion.

    Better means above the champion's 95 % interval on every evaluation set that both have. When a name has no champion
    yet, any version with a score becomes it.

    Args:
        name: registered name.
        version: its number; the candidate when left out.
        protocol: which score decides.
        force_reason: if given, moves the alias whatever the scores are; the text is kept as the reason of the move.

    Raises:
        ValueError: there is no such version, it has no score on the champion's evaluation sets, or it is not better.
    """
    challenger = registry.find_version(f"models:/{name}/{version}" if version else f"models:/{name}@{CANDIDATE}")
    champion = _champion(name)
    if champion is not None and champion.version == challenger.version:
        raise ValueError(f"{name} version {challenger.version} is the champion already")
    if force_reason is not None:
        if not force_reason.strip():
            raise ValueError(
                "--force is empty: write why the scores do not decide, such as --force 'a video was withdrawn'"
            )
        reason = f"forced: {force_reason.strip()}"
    else:
        reason = _reason(name, challenger, champion, protocol)
    return _move(name, str(challenger.version), reason)


def rollback(name: str) -> Move:
    """Restores the previous champion.

    Raises:
        ValueError: there is no previous champion.
    """
    moves = history(name)
    if len(moves) < 2:
        raise ValueError(f"{name} has had {len(moves)} champions: a rollback needs a previous one")
    # The list ends with the restored move, so a second rollback goes back one champion further.
    return _move(name, moves[-2].version, f"rollback of version {moves[-1].version}", kept=moves[:-2])


def history(name: str) -> list[Move]:
    """The champions of a name that led to the present one, oldest first.

    Raises:
        ValueError: nothing is registered under the name.
    """
    model = registry.find_model(name)
    return [Move(**move) for move in json.loads((model.tags or {}).get(_HISTORY_TAG, "[]"))]


def _champion(name: str) -> Any | None:
    moves = history(name)
    return registry.find_version(f"models:/{name}@{CHAMPION}") if moves else None


def _reason(name: str, challenger: Any, champion: Any | None, protocol: str) -> str:
    mine = {score.evaluation_set: score for score in scores_of(challenger) if score.protocol == protocol}
    evaluate = f"run jobs/evaluate.py models:/{name}/{challenger.version}"
    if not mine:
        raise ValueError(
            f"{name} version {challenger.version} has no {protocol} score: {evaluate}, or give a reason with --force"
        )
    if champion is None:
        return f"the first champion: {next(iter(mine.values()))}"
    theirs = {score.evaluation_set: score for score in scores_of(champion) if score.protocol == protocol}
    common = sorted(set(mine) & set(theirs))
    if not common:
        raise ValueError(
            f"{name} version {challenger.version} and the champion, version {champion.version}, have no {protocol} "
            f"score on the same evaluation set: {evaluate} and models:/{name}/{champion.version} with the same --data, "
            "or give a reason with --force"
        )
    for evaluation_set in common:
        if not mine[evaluation_set].value > theirs[evaluation_set].high:
            raise ValueError(
                f"{name} version {challenger.version} is not better than the champion, version {champion.version}: "
                f"{mine[evaluation_set]}, the champion {theirs[evaluation_set]}; a score above the champion's interval "
                "is needed, or a reason with --force"
            )
    return f"{mine[common[0]]}, version {champion.version} {theirs[common[0]]}"


def _move(name: str, version: str, reason: str, *, kept: Sequence[Move] | None = None) -> Move:
    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    move = Move(version, now, reason[:_REASON_LENGTH])
    moves = [*(history(name) if kept is None else kept), move][-_KEPT_MOVES:]
    tracker = tracking.client()
    tracker.set_registered_model_alias(name, CHAMPION, version)
    tracker.set_registered_model_tag(name, _HISTORY_TAG, json.dumps([asdict(each) for each in moves]))
    model_page.describe_name(name)
    return move
