"""No secret of a service is in its logs, jobs, tracker or store. The search runs on every host, after real work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cluster.service import BIN, ROOT, Service
from tests.cluster.survivor import Survivor

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]

COPY = (
    "import sys; from pyarrow import fs; [fs.copy_files(f's3://{name}', f'{sys.argv[1]}/{name}') for name in {names}]"
)
JOBS = (
    "import json, os, requests; token = open(os.environ['RAY_AUTH_TOKEN_PATH']).read(); "
    "get = lambda path: requests.get(os.environ['RAY_API_SERVER_ADDRESS'] + path, "
    "headers={'Authorization': f'Bearer {token}'}).text; print(get('/api/jobs/'))"
)


def test_no_secret_is_kept_anywhere(service: Service, survivor: Survivor, tmp_path: Path) -> None:
    """After an ingest and an eventful run none is in logs of nodes, services and jobs, in tracker or store."""
    assert find(service, tmp_path / "kept") == {}


def test_the_search_finds_what_is_there(service: Service, survivor: Survivor, tmp_path: Path) -> None:
    """After one secret is put into each place, as a careless job would do, the search finds all of them."""
    outside = service.hosts["outside"]
    wrong = secrets_of(service)
    # Into the logs of the node and of the job, into the store, into a tag and an artifact, and into a job's metadata.
    spill = (
        "import os; from vmoco import storage, tracking; word = os.environ['AWS_SECRET_ACCESS_KEY']; print(word); "
        "storage.write_atomic('s3://vmoco/planted', word.encode()); "
        f"print(tracking.note_run('{survivor.run_id}', tags={{'planted': os.environ['MLFLOW_TRACKING_PASSWORD']}}, "
        "documents={'planted.txt': open(os.environ['RAY_AUTH_TOKEN_PATH']).read()}))"
    )
    code, said = service.submit(f'python -c "{spill}"')
    assert code == 0, said
    listed = f"--metadata-json '{json.dumps({'planted': wrong['authority key']})}'"
    outside.run(f"source client.env; {BIN}/ray job submit --verify ca.crt {listed} -- true")
    found = find(service, tmp_path / "kept")
    places = {name: " ".join(sorted(where)) for name, where in found.items()}
    assert "/logs/job-driver-" in places["store key of nodes"]
    assert "kept/logs/" in places["store key of nodes"]
    assert "kept/vmoco/planted" in places["store key of nodes"]
    assert "kept/database.sql" in places["password of user"]
    assert re.search(r"kept/mlflow/\S*planted\.txt", places["token"])
    assert "kept/jobs" in places["authority key"]


def find(service: Service, folder: Path) -> dict[str, set[str]]:
    """Files with a secret in them, by the name of the secret; below `folder` are copies of what is not a file."""
    collect(service, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for host in service.hosts.values():
        files += host.folder.glob("*.log")
        files += [path for path in (host.folder / "ray").rglob("*") if path.is_file() and not path.is_symlink()]
    sought = {name: secret.encode() for name, secret in secrets_of(service).items()}
    # The search must have seen each kind of place: an empty one proves nothing.
    for needed in ("kept/jobs", "kept/logs/", "kept/database.sql", "kept/mlflow/", "kept/vmoco/", "/tracker.log"):
        assert any(needed in str(path) for path in files), needed
    for name in ("head", "one", "two", "three"):
        assert any(f"/{name}/ray/session_" in str(path) and path.suffix == ".log" for path in files), name
    found: dict[str, set[str]] = {}
    for path in files:
        content = path.read_bytes()
        for name, secret in sought.items():
            if secret in content:
                found.setdefault(name, set()).add(str(path))
    return found


def collect(service: Service, folder: Path) -> None:
    """Copies the kept data of jobs, tracker and store into a folder, with an administrator's rights."""
    outside = service.hosts["outside"]
    (folder / "logs").mkdir(parents=True)
    listing = outside.run(f'source client.env; {BIN}/python -c "{JOBS}"')
    listing += outside.run(f"source client.env; {BIN}/ray job list --verify ca.crt")
    (folder / "jobs").write_text(listing)
    for job in sorted(set(re.findall(r"raysubmit_\w+", listing))):
        said = outside.run(f"source client.env; {BIN}/ray job logs --verify ca.crt {job}")
        (folder / "logs" / job).write_text(said)
    code, dump = service.on_database("pg_dump --inserts mlflow")
    assert code == 0, dump
    (folder / "database.sql").write_text(dump)
    copy = COPY.replace("{names}", "('vmoco', 'mlflow')")
    outside.run(f'cd {ROOT}; {BIN}/python -c "{copy}" {folder}', environment=service.store_keys["admin"])


def secrets_of(service: Service) -> dict[str, str]:
    """Every generated secret of the service, by name; for a private key, one line of its middle."""
    lines = (service.secrets / "tracker.env").read_text()
    names = {
        "password of database": "PGPASSWORD",
        "password of administrator": "MLFLOW_AUTH_ADMIN_PASSWORD",
        "session key of tracker": "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "password of user": "MLFLOW_TRACKING_PASSWORD",
    }
    found = {"token": (service.secrets / "token").read_text()}
    for name, variable in names.items():
        (found[name],) = re.findall(rf"\b{variable}=(\w+)", lines)
    for user, keys in service.store_keys.items():
        found[f"store key of {user}"] = keys["AWS_SECRET_ACCESS_KEY"]
    found["authority key"] = (service.secrets / "ca.key").read_text().splitlines()[1]
    found["gateway key"] = (service.secrets / "gateway.key").read_text().splitlines()[1]
    for host in service.hosts.values():
        if (path := host.folder / "node.key").exists():
            found[f"key of {host.name}"] = path.read_text().splitlines()[1]
    assert all(len(secret) >= 20 for secret in found.values())
    return found
