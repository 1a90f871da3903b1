"""The tracker's database survives a newer MLflow: made by an old one, upgraded as the README says, read by ours."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from tests.cluster.service import BIN, ROOT, Service

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

OLD = ["mlflow==3.8.0", "mlflow-skinny==3.8.0", "mlflow-tracing==3.8.0", "sqlalchemy<2.1"]
DATABASE = "postgresql+psycopg:///older"

MAKE = f"""
import mlflow
assert mlflow.__version__ == "3.8.0"
client = mlflow.MlflowClient("{DATABASE}", registry_uri="{DATABASE}")
run = client.create_run(client.create_experiment("vmoco", artifact_location="s3://mlflow/old"), run_name="old")
client.log_metric(run.info.run_id, "loss", 1.5, step=3)
client.set_terminated(run.info.run_id)
client.create_registered_model("night")
version = client.create_model_version("night", "s3://mlflow/old/encoder", run.info.run_id)
client.set_registered_model_alias("night", "candidate", version.version)
print("made", run.info.run_id)
"""

READ = """
from vmoco import tracking
client = tracking.client()
run_id = client.get_model_version_by_alias("night", "candidate").run_id
print("read", run_id, client.get_run(run_id).info.status, tracking.history(run_id, "loss"))
"""


def test_an_older_database_is_upgraded(service: Service, tmp_path: Path) -> None:
    """Run, points, registered encoder and alias of MLflow 3.8 are there after `mlflow db upgrade` of ours."""
    old = tmp_path / "old"
    subprocess.run([BIN / "pip", "install", "--quiet", "--no-deps", "--target", old, *OLD], check=True)
    for name, script in {"make": MAKE, "read": READ}.items():
        (service.shared / f"{name}.py").write_text(script)
    (service.shared / "old").symlink_to(old)

    def on_database(command: str) -> str:
        code, said = service.on_database(command)
        assert code == 0, said
        return said

    on_database("sudo -u postgres createdb --owner=mlflow older")
    made = on_database(f"PYTHONPATH={service.shared}/old {BIN}/python {service.shared}/make.py").split()
    run_id = made[made.index("made") + 1]
    upgrade = next(line for line in (ROOT / "cluster/README.md").read_text().split("`") if "mlflow db upgrade" in line)
    on_database(upgrade.replace("postgresql+psycopg:///mlflow", DATABASE))
    read = on_database(f"cd {ROOT}; MLFLOW_TRACKING_URI={DATABASE} {BIN}/python {service.shared}/read.py")
    assert f"read {run_id} FINISHED [(3, 1.5)]" in read, read
    assert metadata.version("mlflow") != "3.8.0"
