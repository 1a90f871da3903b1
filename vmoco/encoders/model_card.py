"""The model card: README.md with plots, written into an encoder's folder for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmoco.architectures import ARCHITECTURES

README, PLOTS = "README.md", "plots"

Histories = Mapping[str, Sequence[tuple[int, float]]]

DRAWN: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "scores": tuple(f"score/{name}" for name in ("retrieval", "retrieval_by_colour", "arrow", "speed", "order", "knn")),
    "accuracy": ("accuracy",),
    "effective_rank": ("effective_rank",),
    "embedding_std": ("embedding_std",),
    "generator_loss": ("generator_loss",),
}
"""The plots, and the metrics of a run in each, where they were tracked."""
METRICS = tuple(metric for metrics in DRAWN.values() for metric in metrics)
_FEW = 50  # points of a line that are marked


def write(folder: Path, card: Mapping[str, Any], *, histories: Histories) -> list[str]:
    """Writes README.md and plots/*.png; returns the names of the plots.

    Args:
        folder: of the encoder.
        card: the content of encoder.json.
        histories: (step, value) of each metric to draw.
    """
    drawn = draw(folder / PLOTS, histories)
    (folder / README).write_text(page(card, usage=_usage(card), training=_training(drawn, histories)))
    return drawn


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
    others = "It takes other lengths too"
    if (known := ARCHITECTURES.get(card["backbone"])) and known.learns_positions:
        others += ", and interpolates its positions in time then"
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
    rest = f"Features have unit length: compare them by cosine. {others}; the program takes {frames} frames alone."
    return usage + "\n" + filled(f"{preprocessing(card)} {rest}")


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
    if sets := data.get("sets"):
        rows = [
            f"- {each['name']}: {each['weight']:.1%} of the draws; {each['counts']['clips']} clips of "
            f"{each['counts']['videos']} videos; manifest `{each['manifest_hash']}` of `{each['uri']}`"
            for each in sets
        ]
        lines.append("It is a mixture of data sets:\n\n" + "\n".join(rows))
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
    plots = "\n".join(f"![{name}]({PLOTS}/{name}.png)" for name in drawn)
    return f"## Training\n\nLast values: {last_values(histories)}.\n\n{plots}"


def last_values(histories: Histories) -> str:
    """The last value of each metric that has any, as text."""
    return ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in histories.items() if points)


def _versions(card: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    return f"## Made with\n\nCommit {card['git_commit'] or 'not known'} of vmoco; {packages}."


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def draw(folder: Path, histories: Histories) -> list[str]:
    """Draws `DRAWN` as `<name>.png`, each with the metrics of at least two points; returns the names of those drawn."""
    plots = {
        name: {metric: sorted(histories[metric]) for metric in metrics if len(histories.get(metric, ())) > 1}
        for name, metrics in DRAWN.items()
    }
    plots = {name: lines for name, lines in plots.items() if lines}
    if not plots:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    for name, lines in plots.items():
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for metric, points in lines.items():
            label = metric.removeprefix("score/").replace("_", " ")
            marker = "o" if len(points) <= _FEW else ""  # scores of some checkpoints: each of them is seen
            axes.plot(*zip(*points, strict=True), linewidth=1, marker=marker, markersize=3, label=label)
        if len(lines) > 1:
            axes.legend(fontsize="small")
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png", dpi=100)
    return list(plots)
