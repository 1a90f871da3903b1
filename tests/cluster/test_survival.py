"""A run on several hosts outlives one of them: data and checkpoints in S3, tracker on PostgreSQL, token and TLS."""

from __future__ import annotations

import json
import re

import pytest

from tests.cluster.service import BIN, ROOT, Service
from tests.cluster.survivor import LOG_EVERY, NAME, STEPS, Survivor

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_it_goes_on_with_one_worker_and_then_with_two(survivor: Survivor) -> None:
    """When its first rank's host is cut off, it continues on the other from a checkpoint, and grows with a new host."""
    assert [workers for workers, _ in survivor.starts] == [2, 1, 2]
    steps = [step for _, step in survivor.starts]
    assert steps[0] == 0
    assert 50 <= steps[1] < steps[2] < STEPS, steps


def test_every_point_is_in_the_tracker_once(service: Service, survivor: Survivor) -> None:
    """In the tracker's database no point of the loss is missing or doubled, although a first rank was cut off."""
    assert points(service, survivor) == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))


def test_its_encoder_is_pulled_from_outside(service: Service, survivor: Survivor) -> None:
    """With the tracker's password and certificate, and without a key to the store, the encoder can be pulled."""
    outside = service.hosts["outside"]
    listed = outside.run(f"source client.env; cd {ROOT}; {BIN}/python jobs/registry.py list")
    assert f"models:/{NAME}/1  candidate" in listed
    assert any(features(service))


def test_the_tracker_comes_back_from_its_backup(service: Service, survivor: Survivor) -> None:
    """After database and artifacts are lost, the README's commands restore runs, encoders, users and their rights."""
    before = features(service)
    code, said = service.on_database("\n".join(commands("Backup")), environment=service.store_keys["tracker"])
    assert code == 0, said
    service.stop_tracker()
    empty = (
        "from pyarrow import fs; store, path = fs.FileSystem.from_uri('s3://mlflow'); store.delete_dir_contents(path)"
    )
    loss = f'sudo -u postgres dropdb --force mlflow; python -c "{empty}"'
    code, said = service.on_database(loss, environment=service.store_keys["tracker"])
    assert code == 0, said
    code, said = service.on_database("\n".join(commands("Restore")), environment=service.store_keys["tracker"])
    assert code == 0, said
    service.start_tracker()
    assert features(service) == before
    assert points(service, survivor) == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    note = (
        f"from vmoco import tracking; print(repr(tracking.note_run('{survivor.run_id}', tags={{'restored': 'yes'}})))"
    )
    assert (
        service.hosts["outside"].run(f'source client.env; cd {ROOT}; {BIN}/python -c "{note}"').splitlines()[-1] == "''"
    )


def commands(title: str) -> list[str]:
    """The commands of the README in the first block after a title."""
    _, _, after = (ROOT / "cluster/README.md").read_text().partition(f"**{title}**")
    block = re.search(r"(?:^    \S.*\n)+", after, re.MULTILINE)
    assert block is not None, title
    return [line.strip() for line in block.group().splitlines()]


def points(service: Service, survivor: Survivor) -> list[int]:
    """Steps of the points of `loss`, in the order of the tracker's database."""
    query = f"select step from metrics where key = 'loss' and run_uuid = '{survivor.run_id}' order by step"
    code, said = service.on_database(f'psql -At -c "{query}" mlflow')
    assert code == 0, said
    return [int(line) for line in said.split()]


def features(service: Service) -> list[float]:
    """The encoder's features of one grey clip, on a host that has only the tracker's password and certificate."""
    use = (
        "import json, torch, vmoco; "
        f"encoder = vmoco.load_encoder('models:/{NAME}@candidate'); "
        "features = encoder.embed(torch.full((8, 40, 48, 3), 99, dtype=torch.uint8)); "
        "print(json.dumps(features.flatten().tolist()))"
    )
    said = service.hosts["outside"].run(f'source client.env; cd {ROOT}; {BIN}/python -c "{use}"')
    found: list[float] = json.loads(said.splitlines()[-1])
    return found
