"""Makes the pictures of README.md with the commands that it shows: `python -m tests.benchmarks.pictures FOLDER`.

Needs `.venv/bin/pip install -e '.[benchmarks]'` and chromium, and about ten minutes on two cores. The videos are walks
through the maps of Freedoom, whose licence (BSD) allows pictures of them in this repository. The licence of the demo's
footage is not stated everywhere, so no picture of it may be here. FOLDER keeps videos, data set and runs: started
again, jobs that have ended do nothing. Writes `results/{contact_sheet,training,gallery,sweep}.png` beside this file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import vizdoom
from PIL import Image

from tests.benchmarks import doom
from tests.data.videos import write_video
from vmoco.seed import hash64

RESULTS, ROOT = Path(__file__).parent / "results", Path(__file__).parents[2]
NUM_VIDEOS, SECONDS = 12, 12
ENCODER = "models:/walks@candidate"
SPACE = "generator.drop-ratio: [0, 0.25, 0.5]\nmoco.decay: [0.9, 1.0]\n"
RUN = "walks"


def main() -> None:
    """Videos, then the jobs, then the pictures."""
    folder = Path(sys.argv[1]).resolve()
    os.environ["VMOCO_HOME"] = str(folder)
    _render(folder / "videos")
    data, space = str(folder / "data/walks"), folder / "space.yaml"
    space.write_text(SPACE)
    _job("ingest", "--videos", str(folder / "videos"), "--output", data, "--held-out-percent", "25")
    _job("pretrain", "demo", "--data.uri", data, "--run.name", RUN, "--tracking.register-as", "walks")
    _job("embed", ENCODER, "--videos", data, "--output", str(folder / "embeddings"))
    _job("sweep", "tiny", "--data.uri", data, "--space", str(space), "--run.name", "night", "--train.steps", "40")
    with Image.open(folder / "data/walks/contact_sheet.png") as sheet:
        _write(sheet.crop((0, 0, sheet.width, 40 + 6 * 100)), "contact_sheet", width=640)
    _draw_training(RESULTS / "training.png")
    _write(_screenshot(folder / "embeddings/gallery.html", folder, height=735), "gallery", width=700)
    _write(_screenshot(next(folder.glob("runs/night/**/report.html")), folder, height=1000), "sweep", width=800)


def _render(folder: Path) -> None:
    """Walks of some seconds, each through a map of its own."""
    with doom._game() as game:
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        for number in range(1, NUM_VIDEOS + 1):
            path = folder / f"freedoom-{number:02d}.mp4"
            if path.exists():
                continue
            random = np.random.default_rng(hash64("pictures", number))
            game.set_doom_map(f"map{number:02d}")
            game.set_seed(number)
            game.new_episode()
            turn, frames = 0.0, []
            for tic in range(round(SECONDS * doom.FPS)):
                if tic % 20 == 0:
                    turn = random.uniform(-4, 4)
                doom._act(game, [30.0, 0.0, turn, float(tic % 5 == 0)])
                frames.append(game.get_state().screen_buffer.copy())
            write_video(path, frames, fps=35)


def _job(name: str, *flags: str) -> None:
    print(f"jobs/{name}.py {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, f"jobs/{name}.py", *flags], check=True, cwd=ROOT)


def _draw_training(path: Path) -> None:
    """Loss, accuracy and score of the run, from the tracker's own points."""
    import mlflow
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vmoco import tracking

    client = mlflow.MlflowClient(tracking.tracking_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{RUN}'")
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"contrastive loss": ["loss"], "accuracy": ["accuracy"], "score": SCORES}
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name.rpartition("/")[2])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.set_ylim(0, 1)
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})


SCORES = ["score/retrieval", "score/retrieval_by_colour"]


def _screenshot(page: Path, folder: Path, *, height: int) -> Image.Image:
    """The top of a page, as a browser shows it without a network."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no chromium here: apt-get install chromium"
    shot = folder / f"{page.stem}.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size=1200,{height + 600}"]
    command += ["--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        # A tile at the lower edge of the window may still be blank.
        return image.convert("RGB").crop((0, 0, image.width, height))


def _write(image: Image.Image, name: str, *, width: int) -> None:
    """Scaled, and in 128 colours, which keeps each picture below 100 KB."""
    scaled = image.convert("RGB").resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    scaled.quantize(128).save(RESULTS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
