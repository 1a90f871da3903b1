"""Registers an encoder: of a run, of one of its kept checkpoints, or somebody else's weights from a local file.

    python jobs/register.py RUN --name NAME                      # the last checkpoint of a run (its name or MLflow id)
    python jobs/register.py RUN --name NAME --step 4000          # any checkpoint that was kept
    python jobs/register.py r2plus1d_18-91a641e6.pth --name kinetics-r2plus1d     # torchvision's, or VideoMoCo's

The new version gets the alias "candidate". `jobs/registry.py promote` makes it the champion if it scores better. Needs
no Ray.
"""

from pathlib import Path
from typing import Annotated

import tyro

from vmoco import job
from vmoco.job_settings import RegisterOptions


def register(
    source: Annotated[str, tyro.conf.Positional],
    /,
    options: Annotated[RegisterOptions, tyro.conf.arg(name="")],
    step: int | None = None,
) -> None:
    """Registers an encoder.

    Args:
        source: name or MLflow id of a run, or a local file of weights.
        options: name, alias and description.
        step: step of a checkpoint of the run, such as 4000; the last checkpoint when left out.
    """
    from vmoco.train.publish import publish_file, publish_run

    if Path(source).is_file():
        if step is not None:
            raise ValueError(f"--step {step} chooses a checkpoint of a run, and {source} is a file: leave out --step")
        registered = publish_file(Path(source), options)
    else:
        registered = publish_run(source, options, step=step)
    print(f"registered version {registered.version} as {registered.uri}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(register, description=__doc__))
