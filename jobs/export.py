"""Exports an encoder for another library, so that it can be used without vmoco. Needs no Ray.

    python jobs/export.py models:/NAME@champion --to huggingface --out exported

The formats of --to:

    torchvision   weights with the keys of torchvision's network, as safetensors
    huggingface   a model for transformers: AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    onnx          for ONNX Runtime: encoder.onnx
    program       for torch alone: an archive of torch.export

The features are those of the encoder: bit for bit, but for onnx, which may differ by up to 1e-4. The job checks this
before it writes the folder, and prints the lines of Python that load it. README.md in the folder is the model card.
"""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from vmoco import job


def export(
    encoder: Annotated[str, tyro.conf.Positional],
    /,
    *,
    to: Literal["torchvision", "huggingface", "onnx", "program"],
    out: str,
) -> None:
    """Exports an encoder.

    Args:
        encoder: Encoder to export: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder.
        to: Format to write, as listed above.
        out: New or empty folder for the exported files, for example exported.
    """
    from vmoco.encoders import export as exporting

    made = exporting.export(encoder, to=to, folder=out, show=job.show)
    job.show(f"{made.path}: {made.about}")
    for line in made.usage:
        job.show(f"    {line}")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(export, description=__doc__))
