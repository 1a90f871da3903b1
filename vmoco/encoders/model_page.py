"""What MLflow's pages of a registered encoder show: a short model card with plots, in Markdown, as description.

The page of a version shows its own card. The page of the name shows that of the champion, or of the candidate while
there is no champion. MLflow 3 removes pictures with data URIs from descriptions, and its viewer of artifacts shows no
pictures of a README. It does show artifacts of the version by a link that is relative to its own address, which works
behind any host name. Tables have no lines and no spaces there, so scores are a list. A database holds 5,000 characters.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vmoco import tracking
from vmoco.encoders.registry import CANDIDATE, CHAMPION, find_model

MAX_LENGTH = 5000
"""Characters of a description that every database of MLflow holds."""
_PREFIX_LENGTH = 100
_SCORES, _USE = "**Scores**", "**Use**"
_MAX_SCORES = 8
_WRITTEN_TAG = "vmoco.description_sha256"


def describe_version(
    name: str,
    version: str,
    card: Mapping[str, Any],
    *,
    summary: str,
    plots: Sequence[str] = (),
    artifact_page: str = "",
) -> None:
    """Shows the card of a version on its page, and on the page of the name.

    Args:
        name: registered name.
        version: its number.
        card: the content of encoder.json.
        summary: one line; lists of versions show only this one.
        plots: names of the plots of its model card.
        artifact_page: where MLflow's interface shows its files; empty if not known.
    """
    text = version_text(name, version, card, summary=summary, plots=plots, artifact_page=artifact_page)
    tracking.client().update_model_version(name, version, text)
    describe_name(name)


def version_text(
    name: str,
    version: str,
    card: Mapping[str, Any],
    *,
    summary: str,
    plots: Sequence[str] = (),
    artifact_page: str = "",
) -> str:
    """The card of a version, for `describe_version`: Markdown of at most 4,900 characters, the summary first."""
    expected, data = card["preprocessing"], card["data"]
    origin = "weights of another project" if card.get("imported") else f"{card['step']} steps without labels"
    frames = f"{expected['num_frames']} frames at about {expected['fps']:.4g} frames per second"
    uri = f"models:/{name}/{version}"
    shape = f"(N, {expected['num_frames']}, height, width, 3)"
    sections = [
        textwrap.shorten(summary, 300),
        f"**Encoder**: {card['backbone']}, {card['feature_dim']} features, {origin}. It takes clips of {frames} and "
        f"scales them to {expected['size']} pixels.",
        _scores((card.get("scores") or {}).values()),
        f'{_USE}\n\n    import vmoco\n    encoder = vmoco.load_encoder("{uri}")\n'
        '    features = encoder.embed("video.mp4")',
        f'Without vmoco: `mlflow.pyfunc.load_model("{uri}").predict(clips)` takes uint8 RGB {shape} and gives float32 '
        f"(N, {card['feature_dim']}).",
        f"**Data**: {_data(data)}",
    ]
    if artifact_page:
        sections.append(f"[All files, with the complete model card]({artifact_page})")
    pictures = [f"![{plot}]({_artifact(f'plots/{plot}.png', name, version)})" for plot in plots]
    while True:
        text = "\n\n".join([*sections, *([" ".join(pictures)] if pictures else [])])
        if len(text) <= MAX_LENGTH - _PREFIX_LENGTH or not pictures:
            return text[: MAX_LENGTH - _PREFIX_LENGTH]
        pictures.pop()


def _data(data: Mapping[str, Any]) -> str:
    parts = []
    if counts := data.get("counts"):
        parts.append(
            f"{counts['clips']:,} clips of {counts['videos']:,} videos, {counts['held_out']:,} of them held out; "
            f"manifest `{data['manifest_hash']}`."
        )
    parts += [data["description"]] if data.get("description") else []
    return " ".join([*parts, f"Licence of the videos: {textwrap.shorten(data['licence'], 400)}."])


def _scores(rows: Iterable[Mapping[str, Any]]) -> str:
    """The list of scores, each with its 95 % interval and the values to compare it with."""
    lines = [
        f"- {row['protocol']} {row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]; "
        f"{textwrap.shorten(row['beside'], 120)}; on set `{row['evaluation_set']}`"
        for row in rows
    ]
    if not lines:
        return f"{_SCORES}: none yet; `jobs/evaluate.py` adds them."
    if len(lines) > _MAX_SCORES:
        lines[_MAX_SCORES:] = [f"- {len(lines) - _MAX_SCORES} more in the tags"]
    return f"{_SCORES} with 95 % intervals over videos\n\n" + "\n".join(lines)


def _artifact(path: str, name: str, version: str) -> str:
    """Address of a file of a version, relative to that of MLflow's interface."""
    return "model-versions/get-artifact?" + urllib.parse.urlencode(
        {"path": path, "name": name, "version": version}, quote_via=urllib.parse.quote, safe="/"
    )


def show_scores(name: str, version: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the scores in the card of a version, and leaves the rest as it is, also what a person has written.

    Args:
        name: registered name.
        version: its number.
        rows: all scores of the version, as dictionaries of `promotion.Score`.
    """
    tracker = tracking.client()
    before = tracker.get_model_version(name, version).description or ""
    # From the heading to the next one, which is always there in a text that is ours.
    block = re.compile(re.escape(_SCORES) + r".*?(?=\n\n" + re.escape(_USE) + ")", re.DOTALL)
    after = block.sub(lambda _: _scores(rows), before, count=1)
    if after != before and len(after) <= MAX_LENGTH:
        tracker.update_model_version(name, version, after)
        describe_name(name)


def describe_name(name: str) -> None:
    """Shows the card of the champion, or of the candidate if there is no champion, on the page of a name.

    A text that a person has written there stays.

    Raises:
        ValueError: nothing is registered under the name.
    """
    model = find_model(name)
    alias = CHAMPION if CHAMPION in model.aliases else CANDIDATE
    if alias not in model.aliases:
        return
    tracker = tracking.client()
    version = tracker.get_model_version(name, model.aliases[alias])
    before = model.description or ""
    if before and (model.tags or {}).get(_WRITTEN_TAG) != _sha256(before):
        return
    text = f"Version {version.version}, the {alias}: {version.description or 'no description'}"[:MAX_LENGTH]
    tracker.update_registered_model(name, text)
    tracker.set_registered_model_tag(name, _WRITTEN_TAG, _sha256(text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
