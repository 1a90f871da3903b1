"""What one host does not reach, or has in another version, gives one message before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import pytest

from tests.cluster.hosts import Host
from tests.cluster.service import BIN, ROOT, Service
from tests.dataset import make_data_set

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

DATA = "s3://vmoco/data/first"
OWN_DISK = "a path on one machine's own disk does not work for several nodes: give a folder that all share, or s3:// or"


def refused(service: Service, command: str) -> str:
    """The error message of a job that ends before it works."""
    code, said = service.submit(f"python jobs/{command}")
    assert code != 0, said
    assert "tracked as" not in said, said
    assert "ingest  " not in said, said
    return next(line for line in said.splitlines() if line.startswith("error: "))


def workers(service: Service) -> list[Host]:
    """The hosts of the workers that are alive."""
    alive = service.alive()
    return [host for name, host in service.hosts.items() if host.address in alive and name != "head"]


def test_checkpoints_on_a_disk_of_one_host(service: Service, ingested: str) -> None:
    """If the path of run.storage is another disk on each host, no run begins."""
    place = service.disk / "runs"
    line = refused(service, f"pretrain.py tiny --data.uri {DATA} --run.storage {place}")
    assert f"run.storage: this node does not see what the driver's node writes to {place}; {OWN_DISK}" in line
    assert any(f"node {host.address}: " in line for host in workers(service))


def test_data_on_a_disk_of_one_host(service: Service, ingested: str) -> None:
    """If only the head has the data set, no run begins."""
    make_data_set(service.shared / "data")
    code, said = service.submit(f"cp -r {service.shared}/data {service.disk}/data")
    assert code == 0, said
    line = refused(service, f"pretrain.py tiny --data.uri {service.disk}/data --run.storage s3://vmoco/runs")
    assert f"data.uri: there is no {service.disk}/data; {OWN_DISK}" in line


def test_a_data_set_for_a_disk_of_one_host(service: Service, ingested: str) -> None:
    """An ingest to a path that is another disk on each host makes no shard."""
    line = refused(service, f"ingest.py --videos s3://vmoco/videos --output {service.disk}/made")
    assert f"--output: this node does not see what the driver's node writes to {service.disk}/made; {OWN_DISK}" in line


def test_videos_on_a_disk_of_one_host(service: Service) -> None:
    """Videos that only the head has would be missing one by one: their ingest, also by pattern, does not begin."""
    code, said = service.submit(f"mkdir -p {service.disk}/videos && touch {service.disk}/videos/a.mp4")
    assert code == 0, said
    line = refused(service, f"ingest.py --videos {service.disk}/videos/*.mp4 --output s3://vmoco/data/none")
    assert f"--videos: there is no {service.disk}/videos; {OWN_DISK}" in line


def test_a_folder_that_all_hosts_share_works(service: Service) -> None:
    """A local path is not refused where every host sees the same folder: the run trains and ends."""
    make_data_set(service.shared / "seen")
    flags = "--train.steps 2 --scaling.num-workers 2 --evaluation.no-enabled"
    code, said = service.submit(
        f"python jobs/pretrain.py tiny --data.uri {service.shared}/seen --run.storage {service.shared}/runs {flags}"
    )
    assert code == 0, said
    assert "last checkpoint" in said


@pytest.fixture
def walled_in(service: Service) -> Iterator[Host]:
    """A worker's host that cannot reach the machine of the store."""
    host = workers(service)[-1]
    route = f"unreachable {service.hosts['services'].address}/32"
    host.run(f"ip route add {route}")
    yield host
    host.run(f"ip route del {route}")


def test_a_store_that_one_host_does_not_reach(service: Service, ingested: str, walled_in: Host) -> None:
    """The message has the host, the place, and the error of the store's client."""
    line = refused(service, f"pretrain.py tiny --data.uri {DATA} --run.storage s3://vmoco/runs")
    assert line.startswith(f"error: node {walled_in.address}: --run.storage: s3://vmoco/runs cannot be used: "), line


@pytest.fixture
def other(service: Service) -> Iterator[Host]:
    """An additional host whose package av has version 0.0.1."""
    before = len(service.alive())
    (file,) = [file for file in metadata.files("av") or () if file.name == "METADATA"]
    written = service.shared / "METADATA"
    written.write_text("Metadata-Version: 2.1\nName: av\nVersion: 0.0.1\n")
    host = service.add_worker(f"other{before}", before=f"mount --bind {written} {file.locate()}")
    service.wait_for_nodes(before + 1)
    yield host
    host.stop()
    service.wait_for_nodes(before)


def test_a_host_with_another_version(service: Service, ingested: str, other: Host) -> None:
    """Run and check name the package and both hosts."""
    line = refused(service, f"pretrain.py tiny --data.uri {DATA} --run.storage s3://vmoco/runs")
    assert f"node {other.address}" in line
    assert "av 0.0.1" in line
    assert f"{metadata.version('av')}" in line
    assert "install requirements.lock on both" in line
    code, said = service.submit(f"python jobs/check.py cluster tiny --data.uri {DATA} --run.storage s3://vmoco/runs")
    assert code != 0, said
    assert "problem: node" in said
    assert "av 0.0.1" in said


def test_a_host_with_another_ray_does_not_join(service: Service) -> None:
    """`ray start` of another version ends with both versions named, and the cluster is as before."""
    before = len(service.alive())
    outside, head = service.hosts["outside"], service.hosts["head"]
    own = service.node_secrets(outside)
    written = service.shared / "_version.py"
    version = f"{BIN.parent}/lib/python3.11/site-packages/ray/_version.py"
    command = (
        f"sed 's/^version = .*/version = \"2.0.0\"/' {version} > {written}; mount --bind {written} {version}; "
        f"source {own}/node.env; exec timeout 60 {ROOT}/docker/node.sh {BIN}/ray start --block "
        f"--address={head.address}:6379 --node-ip-address={outside.address} --temp-dir={own}/ray"
    )
    code, said = outside.attempt(command)
    assert code != 0, said
    assert "ersion mismatch" in said, said
    assert "2.0.0" in said, said
    assert len(service.alive()) == before
