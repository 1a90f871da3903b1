"""Other libraries read what vmoco writes, in an environment that has them and no vmoco.

DuckDB, Polars and Hugging Face's datasets open the table of embeddings and the shards, by the lines of METHOD.md, and
transformers loads an exported encoder.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.dataset import make_data_set, stored_clips
from tests.embeddings import embedded, labelled_data_set
from tests.environments import mixed_environment, requirements
from tests.made import clips, encoder_of
from vmoco.data.manifest import Manifest
from vmoco.encoders import export, package

ROOT = Path(__file__).parents[1]
# Exact versions, as in the lock file, which these packages are not in: no other test needs them.
PEERS = ("duckdb==2.0.1", "polars==2.1.0", "datasets==5.2.0", "transformers==5.24.0")
LINKED = ("torch", "torchvision", "safetensors", "numpy", "pandas", "pyarrow")
LINEAGE = {
    "step": 7,
    "run_id": "a run",
    "settings_hash": "5e77",
    "data": {"manifest_hash": "da7a", "uri": "/data", "counts": None, "licence": "mine"},
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the environment: the peers by pip, torch and what else they share with vmoco as it is here."""
    reused = requirements(LINKED)
    assert "vmoco" not in reused
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"[\w.-]+==", line)]
    return mixed_environment(
        tmp_path_factory.mktemp("peers") / "environment", *PEERS, reused=reused, constraints=[*pins, *PEERS]
    )


def run(python: Path, code: str, folder: Path) -> None:
    """Runs code in the environment, in an empty home and without a network."""
    words = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    program = f"{code}\nimport sys\nassert 'vmoco' not in sys.modules"
    done = subprocess.run(
        [str(python), "-c", program],
        capture_output=True,
        text=True,
        env=words | offline,
        cwd=folder,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def documented(title: str) -> str:
    """The lines of code of METHOD.md below a line that ends with a title and a colon."""
    text = (ROOT / "vmoco" / "METHOD.md").read_text()
    _, _, rest = text.partition(f"{title}:\n\n")
    lines = rest.split("\n\n")[0].splitlines()
    assert lines, f"METHOD.md has no code below {title}"
    assert all(line.startswith("    ") for line in lines), lines
    return "\n".join(line.removeprefix("    ") for line in lines)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return labelled_data_set(tmp_path_factory.mktemp("data"), num_videos=8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_duckdb_polars_and_datasets_read_a_table(python: Path, data: Manifest, tmp_path: Path) -> None:
    """All give the same clips and features, those of the encoder; DuckDB finds the nearest clip."""
    encoder = encoder_of(num_frames=10)
    embedded(encoder, data, tmp_path / "table")
    code = documented("A table of embeddings").replace("TABLE", str(tmp_path / "table"))
    save = f"""
import numpy as np
frame = polars_table.sort("clip_id")
np.savez({str(tmp_path / "found.npz")!r}, clip_id=frame["clip_id"].to_list(), polars=frame["feature"].to_numpy(),
         duckdb=np.stack([row[1] for row in sorted(duckdb_rows)]), ids=[row[0] for row in sorted(duckdb_rows)],
         datasets=np.stack([row["feature"] for row in sorted(rows, key=lambda row: row["clip_id"])]),
         nearest=np.array(nearest))
"""
    run(python, f"{code}{save}", tmp_path)
    found = np.load(tmp_path / "found.npz")
    order = np.argsort(data.table["clip_id"].to_pylist())
    expected = encoder.embed(np.stack(stored_clips(data))[order]).numpy()
    assert found["clip_id"].tolist() == found["ids"].tolist() == sorted(data.table["clip_id"].to_pylist())
    for name in ("polars", "duckdb", "datasets"):
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
    similar = expected @ expected.T - 2 * np.eye(len(expected))
    first, second = np.unravel_index(similar.argmax(), similar.shape)
    assert set(found["nearest"][0]) == {found["ids"][first], found["ids"][second]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_duckdb_polars_and_datasets_read_a_shard(python: Path, tmp_path: Path, encoding: str) -> None:
    """All give its rows and the pixels of each clip: frames as bytes in one row, or a JPEG for each frame."""
    manifest = make_data_set(tmp_path / "data", num_videos=4, encoding="jpeg" if encoding == "jpeg" else "raw")
    shard = manifest.shard_uri("0000").removeprefix("file://")
    code = documented("A shard").replace("SHARD", shard)
    if encoding == "jpeg":  # its columns are of types that datasets knows
        code = code.replace(", features=features", "")
        code = "\n".join(line for line in code.splitlines() if not line.startswith("features"))
    save = f"""
import numpy as np
def flat(frames):
    return b"".join(frames) if isinstance(frames[0], bytes) else np.asarray(frames, np.uint8).tobytes()
np.savez({str(tmp_path / "found.npz")!r}, duckdb_ids=[row[0] for row in duckdb_rows],
         polars_ids=polars_table["clip_id"].to_list(), datasets_ids=[row["clip_id"] for row in rows],
         duckdb=[np.frombuffer(flat(row[1]), np.uint8)[:99] for row in duckdb_rows],
         polars=[np.frombuffer(flat(frames), np.uint8)[:99] for frames in polars_table["frames"].to_numpy()],
         datasets=[np.frombuffer(flat(row["frames"]), np.uint8)[:99] for row in rows],
         sizes=[len(flat(row["frames"])) for row in rows])
"""
    run(python, f"{code}{save}", tmp_path)
    found = np.load(tmp_path / "found.npz")
    rows = [row for row in manifest.table.to_pylist() if row["shard"] == "0000"]
    content = Path(shard).read_bytes()
    for name in ("duckdb", "polars", "datasets"):
        assert found[f"{name}_ids"].tolist() == [row["clip_id"] for row in rows], name
        for row, begin in zip(rows, found[name], strict=True):
            stored = content[row["offset"] : row["offset"] + row["num_bytes"]]
            if encoding == "raw":
                assert bytes(begin) == stored[: len(begin)], name
            else:  # after a table of sizes
                assert bytes(begin) in stored, name
    if encoding == "raw":
        assert found["sizes"].tolist() == [row["num_bytes"] for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["r3d_nano", "r2plus1d_18", "s3d"])
def test_transformers_loads_an_export(python: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, maps and pooled features are those of the encoder, and again after transformers has saved the model.

    Two processes may round differently: a sum depends on where its numbers lie in memory, on some CPUs (AMD).
    It computes in bfloat16, and gives gradients; no weight is missing or unknown.
    """
    monkeypatch.setattr(package, "write_program", lambda encoder, folder: None)
    encoder = encoder_of(name, size=40)
    (tmp_path / "encoder").mkdir()
    package.write_folder(tmp_path / "encoder", encoder.backbone, name, encoder.preprocessing, lineage=LINEAGE)
    made = export.export(str(tmp_path / "encoder"), to="huggingface", folder=str(tmp_path / "exported"))
    frames = clips(height=70, width=50)
    np.save(tmp_path / "clips.npy", frames.numpy())
    printed = "\n".join(made.usage)
    code = f"""
import numpy as np, torch
clips = torch.from_numpy(np.load({str(tmp_path / "clips.npy")!r}))
{printed}
_, report = transformers.AutoModel.from_pretrained({str(made.path)!r}, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
out = model(clips)
model.save_pretrained("saved")
again = transformers.AutoModel.from_pretrained("saved", trust_remote_code=True)
torch.testing.assert_close(again.embed(clips), features, rtol=1e-5, atol=1e-6)
assert again.config.image_size == 40 and again.config.num_frames == 8 and again.config.hidden_size == features.shape[1]
half = transformers.AutoModel.from_pretrained({str(made.path)!r}, trust_remote_code=True, dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16 and (half.embed(clips) - features).abs().max() < 0.05
np.savez({str(tmp_path / "features.npz")!r}, embed=features.numpy(), pooled=out.pooler_output.detach().numpy(),
         maps=out.last_hidden_state.detach().numpy())
model.train()
model(model.encoder.preprocess(clips)).pooler_output.sum().backward()
assert all(weights.grad is not None for weights in model.parameters())
"""
    run(python, code, tmp_path)
    found = np.load(tmp_path / "features.npz")
    expected = {"embed": encoder.embed(frames), "pooled": encoder(frames), "maps": encoder.feature_maps(frames)}
    for each, features in expected.items():
        # In another process sums are rounded otherwise: relative to the largest values, not to one that is nearly 0.
        values = features.detach().numpy()
        np.testing.assert_allclose(found[each], values, rtol=0, atol=1e-5 * np.abs(values).max())
