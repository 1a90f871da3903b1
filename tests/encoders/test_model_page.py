"""MLflow's pages of an encoder show its card with plots, the newest scores, and what a person has written."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.browser import dom_of
from tests.dataset import make_data_set
from tests.made import tracked_run
from tests.tracking_server import TrackingServer
from vmoco import tracking
from vmoco.encoders import model_page, registry
from vmoco.encoders.encoder_program import SHA256_TAG
from vmoco.encoders.promotion import Score, promote, record, rollback
from vmoco.job_settings import RegisterSettings
from vmoco.train.publish import publish_run

CARD: dict[str, Any] = {
    "backbone": "r3d_nano",
    "feature_dim": 128,
    "step": 1000,
    "preprocessing": {"num_frames": 8, "fps": 12.5, "size": 32},
    "data": {
        "manifest_hash": "abc",
        "counts": {"clips": 24, "videos": 12, "held_out": 3},
        "licence": "CC BY 4.0, by us",
    },
}


def score(value: float, evaluation_set: str = "set-a") -> Score:
    return Score("label-free", evaluation_set, value, value - 0.05, value + 0.05, "chance 10 %")


def page(name: str, version: str = "") -> str:
    client = tracking.client()
    found = client.get_model_version(name, version) if version else client.get_registered_model(name)
    return str(found.description)


@pytest.fixture
def name(tracker_home: Path) -> str:
    """A registered name with two versions that have a page, and no files."""
    run_id = tracking.create_import("none", tags={f"{SHA256_TAG}.encoder": "0"})
    for number in ("1", "2"):
        registry.register(run_id, name="tested", alias="candidate")
        model_page.describe_version("tested", number, CARD, summary=f"run number {number}", plots=["loss"])
    return "tested"


def test_the_page_of_a_version_is_its_card(name: str) -> None:
    """The summary comes first, because lists show one line; then size, use, data with licence, and the plot."""
    text = page(name, "2")
    assert text.splitlines()[0] == "run number 2"
    for said in (
        "r3d_nano, 128 features, 1000 steps without labels",
        "8 frames at about 12.5 frames per second",
        'vmoco.load_encoder("models:/tested/2")',
        "uint8 RGB (N, 8, height, width, 3)",
        "24 clips of 12 videos, 3 of them held out",
        "Licence of the videos: CC BY 4.0, by us.",
        "**Scores**: none yet",
        "![loss](model-versions/get-artifact?path=plots/loss.png&name=tested&version=2)",
    ):
        assert said in text


def test_scores_that_are_measured_later_are_shown(name: str) -> None:
    """They replace the old list in the text of the version and of the name; whatever else a person wrote stays."""
    client = tracking.client()
    client.update_model_version(name, "2", page(name, "2").replace("run number 2", "our best one"))
    record("models:/tested/2", [score(0.5)])
    record("models:/tested/2", [score(0.75), score(0.625, "set-b")])
    for text in (page(name, "2"), page(name)):
        assert "our best one" in text
        assert "- label-free 75.0% [70.0%, 80.0%]; chance 10 %; on set `set-a`" in text
        assert "- label-free 62.5%" in text
        assert "none yet" not in text
        assert "50.0%" not in text
        assert text.count("**Scores**") == 1
    client.update_model_version(name, "1", "my own words")
    record("models:/tested/1", [score(0.4)])
    assert page(name, "1") == "my own words"


def test_the_page_of_the_name_is_that_of_the_champion(name: str) -> None:
    """Of the candidate before there is a champion, and of the previous champion after a rollback."""
    assert page(name).startswith("Version 2, the candidate: run number 2")
    for number, value in (("1", 0.5), ("2", 0.9)):
        record(f"models:/tested/{number}", [score(value)])
        promote(name, version=number)
        assert page(name).startswith(f"Version {number}, the champion: run number {number}")
    rollback(name)
    assert page(name).startswith("Version 1, the champion")


def test_what_a_person_writes_on_the_page_of_the_name_stays(name: str) -> None:
    """A new version does not replace it."""
    tracking.client().update_registered_model(name, "Ours. Ask Kim.")
    model_page.describe_version(name, "2", CARD, summary="newer")
    assert page(name) == "Ours. Ask Kim."
    assert page(name, "2").startswith("newer")


def test_no_text_is_longer_than_a_database_holds() -> None:
    """With long names, licences and many scores it has 4,900 characters at most; plots are left out first."""
    card = CARD | {
        "data": CARD["data"] | {"licence": "by many " * 1000},
        "scores": {str(number): {**vars(score(0.5)), "beside": "much " * 200} for number in range(40)},
    }
    plots = ["loss", "scores", "accuracy", "effective_rank", "embedding_std", "generator_loss"]
    text = model_page.version_text(
        "ä" * 250, "1", card, summary="long " * 500, plots=plots, artifact_page="#/" + "a" * 100
    )
    assert len(text) <= 4900
    assert "- 32 more in the tags" in text
    assert text.count("- label-free") == 8
    assert "**Data**" in text
    few = model_page.version_text("name", "1", CARD, summary="short", plots=plots)
    assert few.count("![") == len(plots)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_browser_shows_the_plots(tmp_path: Path, vmoco_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real server: MLflow's page keeps the pictures of the text, and their addresses answer with pictures."""
    manifest = make_data_set(tmp_path / "data", num_held_out=4)
    (tmp_path / "server").mkdir()
    with TrackingServer(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        tracked_run(tmp_path, manifest, steps=(10,))
        publish_run("a-run", RegisterSettings(name="my encoder", score=False))
        addresses = re.findall(r"!\[\w+\]\((\S+)\)", page("my encoder", "1"))
        assert [re.findall(r"plots/(\w+)\.png", address) for address in addresses] == [["loss"], ["effective_rank"]]
        for address in addresses:
            content = urllib.request.urlopen(f"{server.address}/{address}", timeout=30).read()
            assert content.startswith(b"\x89PNG")
        for shown in ("my%20encoder", "my%20encoder/versions/1"):
            dom = dom_of(f"{server.address}/#/models/{shown}", profile=tmp_path / "profile")
            assert re.findall(r'<img src="(model-versions/[^"]+)"', dom) == [
                address.replace("&", "&amp;") for address in addresses
            ]
