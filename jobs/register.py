"""Registers the encoder of a run, or weights of another project, as a new version of a name in MLflow's registry.

The last checkpoint of a run, which is given by its name or its MLflow id:

    python jobs/register.py RUN --name videomoco-kinetics

Another checkpoint that the run has kept:

    python jobs/register.py RUN --name videomoco-kinetics --step 4000

A local file with weights of torchvision, or of the released VideoMoCo code. Networks of torchvision are also found
inside DDP, torch.compile and Lightning, and so is mmaction2's ResNet3d where its layers compute the same:

    python jobs/register.py r2plus1d_18-91a641e6.pth --name kinetics-r2plus1d

The new version gets the alias candidate. `jobs/registry.py promote` makes it the champion if it scores better. This job
needs no Ray.
"""

from pathlib import Path
from typing import Annotated

import tyro

from vmoco import job
from vmoco.job_settings import RegisterSettings


def register(
    source: Annotated[str, tyro.conf.Positional],
    /,
    settings: Annotated[RegisterSettings, tyro.conf.arg(name="")],
    step: int | None = None,
) -> None:
    """Registers an encoder.

    Args:
        source: Name or MLflow id of a run, or a local file with weights.
        settings: See `RegisterSettings`.
        step: Step of the checkpoint to register, for example 4000. When left out: the last checkpoint of the run.
    """
    from vmoco.train.publish import publish_file, publish_run

    if Path(source).is_file():
        if step is not None:
            raise ValueError(f"--step {step} chooses a checkpoint of a run, and {source} is a file: leave out --step")
        registered = publish_file(Path(source), settings)
    else:
        registered = publish_run(source, settings, step=step)
    print(f"registered version {registered.version} as {registered.uri}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(register, description=__doc__))
