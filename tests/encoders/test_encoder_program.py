"""The program that is stored with an encoder opens only files with the recorded hash, and refuses other clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.made import clips, encoder_of
from vmoco.encoders import encoder_program, package
from vmoco.encoders.encoder_program import CARD, PROGRAM, SHA256_TAG
from vmoco.storage import file_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoder = encoder_of()
    package.write_folder(tmp_path, encoder.backbone, "r3d_nano", encoder.preprocessing, lineage={})
    return tmp_path


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    """A folder as MLflow fetches it by name, and the registry's record of its card."""
    import mlflow

    (folder / "registered_model_meta").write_text("model_name: 'an encoder'\nmodel_version: '3'\n")

    class Client:
        def get_model_version(self, name: str, number: str) -> SimpleNamespace:
            assert (name, number) == ("an encoder", "3")
            return SimpleNamespace(name=name, version=number, tags={SHA256_TAG: sha256})

    monkeypatch.setattr(mlflow, "MlflowClient", Client)


def never(*_: object, **__: object) -> None:
    raise AssertionError("an archive was opened before it was checked")


def test_raw_clips_give_the_encoders_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are equal bit for bit, for frames of any size, read-only frames, and a record that matches."""
    recorded(folder, monkeypatch, file_sha256(str(folder / CARD)))
    program = encoder_program._load_pyfunc(str(folder))
    locked = clips(height=70, width=40).numpy()
    locked.flags.writeable = False
    for frames in (clips().numpy(), locked):
        assert np.array_equal(program.predict(frames), encoder_of().embed(frames).numpy())


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((1, 8, 40, 48, 3)), np.zeros((1, 7, 40, 48, 3), np.uint8), np.zeros((8, 40, 48, 3), np.uint8)],
    ids=["float", "7 frames", "4-D"],
)
def test_other_clips_are_refused(folder: Path, wrong: np.ndarray) -> None:
    """The message names the shape that came and the one that is needed."""
    with pytest.raises(
        ValueError, match=r"clips are .*: give uint8 RGB, of shape \(clips, 8 frames, height, width, 3\)"
    ):
        encoder_program.EncoderProgram(folder).predict(wrong)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_changed_program_is_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """With one changed bit, half of the file or an empty file, torch.export.load is never called."""
    content = bytearray((folder / PROGRAM).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / PROGRAM).write_bytes(content if how == "flipped" else content[: len(content) // 2])
    if how == "missing":
        (folder / PROGRAM).unlink()
    monkeypatch.setattr(torch.export, "load", never)
    with pytest.raises(ValueError, match=r"is damaged or was changed|is missing"):
        encoder_program.EncoderProgram(folder)


def test_a_program_changed_together_with_its_card_is_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the registry's record of the card is trusted."""
    recorded(folder, monkeypatch, file_sha256(str(folder / CARD)))
    (folder / PROGRAM).write_bytes(b"another program")
    card = json.loads((folder / CARD).read_text())
    card["files"][PROGRAM] = file_sha256(str(folder / PROGRAM))
    (folder / CARD).write_text(json.dumps(card))
    monkeypatch.setattr(torch.export, "load", never)
    with pytest.raises(ValueError, match=r"is not what was registered as an encoder version 3"):
        encoder_program.EncoderProgram(folder)
