"""The model card: README.md with plots, written into an encoder's folder for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README, PLOTS = "README.md", "plots"

Histories = Mapping[str, Sequence[tuple[int, float]]]


def write(folder: Path, card: Mapping[str, Any], *, histories: Histories) -> None:
    """Writes README.md and plots/*.png.

    Args:
        folder: of the encoder.
        card: the content of encoder.json.
        histories: (step, value) of each metric to draw.
    """
    drawn = draw(folder / PLOTS, histories)
    (folder / README).write_text(page(card, usage=_usage(card), training=_training(drawn, histories)))


def page(card: Mapping[str, Any], *, usage: str, training: str = "", complete: bool = True) -> str:
    """The text of README.md.

    Args:
        card: the content of encoder.json.
        usage: the section that says how to use the files beside it.
        training: the section with the plots.
        complete: whether settings.json and videos.parquet, which the page names, are beside it.
    """
    sections = [
        f"# A video encoder: {card['backbone']}, {card['feature_dim']} features",
        _origin(card, complete=complete),
        usage,
        _data(card, complete=complete),
        _scores(card),
        training,
        _versions(card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _origin(card: Mapping[str, Any], *, complete: bool) -> str:
    if imported := card.get("imported"):
        text = (
            f"Weights from the file `{imported['file']}` ({imported['format']}), not trained by vmoco; SHA-256 of the "
            f"file `{imported['sha256']}`."
        )
        return f"{text} Read as {found}." if (found := imported.get("found")) else text
    text = (
        f"Pretrained without labels (VideoMoCo, Pan et al., CVPR 2021) by vmoco, {card['step']} steps; MLflow run "
        f"`{card['run_id']}`, settings hash `{card['settings_hash']}`."
    )
    if complete:
        text += " `settings.json` has all settings."
    if began := card.get("began_from"):
        text += f" The run began with the weights of `{began}`, which may have seen other videos than those below."
    return text


def _usage(card: Mapping[str, Any]) -> str:
    frames = card["preprocessing"]["num_frames"]
    usage = textwrap.dedent(
        f"""\
        ## How to use it

            import vmoco
            encoder = vmoco.load_encoder("models:/NAME@ALIAS")      # reads safetensors and JSON only
            features = encoder.embed("video.mp4")                   # or uint8 frames (T, H, W, 3), RGB

        Without vmoco, with only torch and MLflow (this runs the code in the encoder's folder):

            model = mlflow.pyfunc.load_model("models:/NAME@ALIAS")
            features = model.predict(clips)                         # uint8 (B, {frames}, H, W, 3), RGB
        """
    )
    return usage + "\n" + filled(f"{preprocessing(card)} Features have unit length: compare them by cosine.")


def filled(text: str) -> str:
    """A paragraph in lines of readable length."""
    return textwrap.fill(text, width=112, break_on_hyphens=False)


def preprocessing(card: Mapping[str, Any]) -> str:
    """What the encoder expects of a clip, in sentences."""
    expected = card["preprocessing"]
    normalised = f"by mean {_numbers(expected['mean'])} and deviation {_numbers(expected['std'])}"
    if expected.get("standardise"):
        normalised = "so that each clip has mean 0 and deviation 1"
    return (
        f"It expects clips of {expected['num_frames']} frames at about {expected['fps']:.4g} frames per second. Frames "
        f"of any size are cut to their middle square, scaled to {expected['size']} pixels, and normalised {normalised}."
    )


def _data(card: Mapping[str, Any], *, complete: bool) -> str:
    data = card["data"]
    lines = ["## What it was trained on"]
    if counts := data.get("counts"):
        lines.append(
            f"{counts['clips']} clips of {counts['videos']} videos; {counts['held_out']} of the videos were held out; "
            f"manifest `{data['manifest_hash']}` of `{data['uri']}`."
            + (" Their names are in `videos.parquet`." if complete else "")
        )
    if description := data.get("description"):
        lines.append(description)
    lines.append(f"Licence of the videos: {data['licence']}.")
    return "\n\n".join(lines)


def _scores(card: Mapping[str, Any]) -> str:
    scores = card.get("scores") or {}
    if not scores:
        return (
            "## Scores\n\nIt had no scores when it was registered. `jobs/evaluate.py` adds scores to the tags of the "
            "registered version in MLflow."
        )
    lines = ["## Scores", "", "| protocol | score | 95 % interval over videos | to compare | evaluation set |"]
    lines.append("|---|---|---|---|---|")
    for protocol, row in scores.items():
        lines.append(
            f"| {protocol} | {row['value']:.1%} | {row['low']:.1%} to {row['high']:.1%} | {row['beside']} | "
            f"`{row['set']}` |"
        )
    return "\n".join(lines)


def _training(drawn: Sequence[str], histories: Histories) -> str:
    if not drawn:
        return ""
    last = ", ".join(f"{name} {histories[name][-1][1]:.4g}" for name in drawn)
    return "## Training\n\nLast values: " + last + ".\n\n" + "\n".join(f"![{n}]({PLOTS}/{n}.png)" for n in drawn)


def _versions(card: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    return f"## Made with\n\nCommit {card['git_commit'] or 'not known'} of vmoco; {packages}."


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def draw(folder: Path, histories: Histories) -> list[str]:
    """Draws `<metric>.png` for each metric with at least two points; returns the names of those drawn."""
    drawn = [name for name, points in histories.items() if len(points) > 1]
    if not drawn:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    for name in drawn:
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        points = sorted(histories[name])
        axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png", dpi=100)
    return drawn
