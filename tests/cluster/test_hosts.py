"""Two hosts become one cluster that takes jobs from outside, but only with the token: the short form for CI."""

from __future__ import annotations

import pytest

from tests.cluster.service import BIN, ROOT, Service

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# A job on the head, which has no CPUs, and a task, which therefore runs on the worker; each says where it is.
JOB = (
    "import ray; ray.init(); here = ray.util.get_node_ip_address; "
    "print('hosts', here(), ray.get(ray.remote(here).remote()))"
)


def test_a_job_from_outside_runs_on_both_hosts(ray_hosts: Service) -> None:
    """A job submitted through the gateway: its driver runs on the head and its task on the worker."""
    code, said = ray_hosts.submit(f'python -c "{JOB}"', timeout=120)
    assert code == 0, said
    hosts = ray_hosts.hosts
    assert f"hosts {hosts['head'].address} {hosts['one'].address}" in said.splitlines()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH", "Missing authentication token"),
        ("unset RAY_AUTH_TOKEN_PATH; export RAY_AUTH_TOKEN=wrong", "Invalid authentication token"),
    ],
    ids=["no token", "wrong token"],
)
def test_a_job_without_the_token_is_refused(ray_hosts: Service, change: str, said: str) -> None:
    """Without the token or with a wrong one nothing is submitted, even with the certificate."""
    command = f"source client.env; {change}; {BIN}/ray job submit --verify ca.crt -- true"
    code, printed = ray_hosts.hosts["outside"].attempt(command)
    assert code != 0
    assert said in printed, printed


def test_a_host_without_the_secrets_does_not_join(ray_hosts: Service) -> None:
    """A host with a wrong token, or without a certificate, does not join, although a later host does."""
    hosts, address = ray_hosts.hosts, ray_hosts.hosts["head"].address
    changes = {"outside": "unset RAY_AUTH_TOKEN_PATH; export RAY_AUTH_TOKEN=wrong", "services": "export RAY_USE_TLS=0"}
    for name, change in changes.items():
        own = ray_hosts.node_secrets(hosts[name])
        hosts[name].start(
            f"source {own}/node.env; {change}; exec {ROOT}/docker/node.sh {BIN}/ray start --block "
            f"--address={address}:6379 --node-ip-address={hosts[name].address} --temp-dir={own}/ray",
            log="intruder.log",
        )
    late = ray_hosts.add_worker("late")
    ray_hosts.wait_for_nodes(3)
    assert set(ray_hosts.alive()) == {address, hosts["one"].address, late.address}
    for name in changes:
        assert "Ray runtime started" in late.said("ray.log")
        assert "Ray runtime started" not in hosts[name].said("intruder.log")
