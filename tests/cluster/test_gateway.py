"""A real service refuses every request without the token, the password, a certificate or the right key."""

from __future__ import annotations

import json

import pytest

from tests.cluster.service import BIN, ROOT, Service

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

# Sends requests to each port of a host: plain HTTP, TLS without a certificate, and TLS with a certificate but without
# the token. Prints the answers.
ASK = """
import grpc, json, sys, urllib.error, urllib.request
host, folder, token, *ports = sys.argv[1:]
read = lambda name: open(f"{folder}/{name}", "rb").read()
METHODS = {"6379": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "6380": "/ray.rpc.NodeManagerService/GetNodeStats"}
def http(port, path, **headers):
    request = urllib.request.Request(f"http://{host}:{port}{path}", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return type(error).__name__
def handshake(port, credentials):
    with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=2)
            return "ready"
        except grpc.FutureTimeoutError:
            return "refused"
def call(port, method, credentials, metadata):
    with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name
strangers = grpc.ssl_channel_credentials(read("ca.crt"))
nodes = grpc.ssl_channel_credentials(read("ca.crt"), read("node.key"), read("node.crt"))
found = {}
for port in ports:
    found[port] = {
        "plain": http(port, "/metrics"),
        "jobs": http(port, "/api/jobs/"),
        "wrong token": http(port, "/api/jobs/", Authorization="Bearer wrong"),
        "without certificate": handshake(port, strangers),
    }
    if port in METHODS:
        for name, word in {"no token": None, "a wrong token": "wrong", "the token": token}.items():
            metadata = [("authorization", f"Bearer {word}")] if word else []
            found[port][name] = call(port, METHODS[port], nodes, metadata)
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", ["head", "one"])
def test_every_port_of_a_node_asks_for_token_or_certificate(service: Service, name: str) -> None:
    """Of all ports of a node, only those of metrics answer without token or certificate."""
    host, outside = service.hosts[name], service.hosts["outside"]
    ports = host.listening()
    expected = {6380, 6381, 6382, 6383, 8080, 52365} | ({6379, 8265, 10001, 44217, 44227} if name == "head" else set())
    assert expected <= ports
    assert all(20000 <= port <= 20999 for port in ports - expected), (
        f"not in cluster/README.md: {sorted(ports - expected)}"
    )
    (outside.folder / "ask.py").write_text(ASK)
    token = (service.secrets / "token").read_text()
    asked = outside.run(
        f"{BIN}/python ask.py {host.address} {host.folder} {token} {' '.join(map(str, sorted(ports)))} 2>/dev/null",
        timeout=300,
    )
    answers = json.loads(asked.splitlines()[-1])
    open_ports = {int(port) for port, answer in answers.items() if answer["plain"] == 200}
    assert open_ports == {8080} | ({44217, 44227} if name == "head" else set())
    for port in set(answers) - {str(each) for each in open_ports}:
        answer = answers[port]
        assert answer["without certificate"] == "refused", port
        assert answer["plain"] in (401, "RemoteDisconnected", "ConnectionResetError", "BadStatusLine"), (port, answer)
        assert answer["jobs"] in (401, "RemoteDisconnected", "ConnectionResetError", "BadStatusLine"), (port, answer)
        assert answer["wrong token"] in (403, "RemoteDisconnected", "ConnectionResetError", "BadStatusLine"), (
            port,
            answer,
        )
    for port in {"6379", "6380"} & set(answers):
        assert answers[port]["no token"] == "UNAUTHENTICATED", port
        assert answers[port]["a wrong token"] == "UNAUTHENTICATED", port
        assert answers[port]["the token"] != "UNAUTHENTICATED", port


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH", "401"),
        ("unset RAY_AUTH_TOKEN_PATH; export RAY_AUTH_TOKEN=wrong", "403"),
        ("unset REQUESTS_CA_BUNDLE; verify=", "certificate verify failed"),
    ],
    ids=["no token", "wrong token", "unknown authority"],
)
def test_the_job_server_refuses_at_the_gateway(service: Service, change: str, message: str) -> None:
    """`ray job list` fails without token, with a wrong one, and with a gateway of an unknown authority."""
    outside = service.hosts["outside"]
    command = f"source client.env; verify='--verify ca.crt'; {change}; {BIN}/ray job list $verify"
    code, printed = outside.attempt(command)
    assert code != 0
    assert message in printed or "uthenticat" in printed, printed
    code, printed = outside.attempt(f"source client.env; {BIN}/ray job list --verify ca.crt")
    assert code == 0, printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("export MLFLOW_TRACKING_PASSWORD=wrong-password", "401"),
        ("unset MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_USERNAME", "401"),
        ("unset MLFLOW_TRACKING_SERVER_CERT_PATH REQUESTS_CA_BUNDLE", "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["wrong password", "no password", "unknown authority"],
)
def test_the_tracker_refuses_at_the_gateway(service: Service, change: str, message: str) -> None:
    """MLflow's client fails without password, with a wrong one, and with a gateway of an unknown authority."""
    search = "from vmoco import tracking; print(len(tracking.client().search_experiments()))"
    outside = service.hosts["outside"]
    code, printed = outside.attempt(f"source client.env; {change}; cd {ROOT}; {BIN}/python -c '{search}'")
    assert code != 0
    assert message in printed, printed


def test_the_tracker_answers_only_to_its_own_names(service: Service) -> None:
    """A request with a foreign Host header, as in DNS rebinding, is refused even with the password."""
    outside, services = service.hosts["outside"], service.hosts["services"]
    ask = (
        "import os, requests; r = requests.get(os.environ['MLFLOW_TRACKING_URI'] + "
        "'/api/2.0/mlflow/experiments/get?experiment_id=0', headers={'Host': host} if (host := os.environ.get('NAME')) "
        "else {}, auth=('vmoco', os.environ['MLFLOW_TRACKING_PASSWORD'])); print(r.status_code)"
    )
    assert services.address in (outside.folder / "client.env").read_text()
    assert outside.run(f'source client.env; {BIN}/python -c "{ask}"').split()[-1] == "200"
    assert outside.run(f'source client.env; NAME=evil.example {BIN}/python -c "{ask}"').split()[-1] == "403"


@pytest.mark.parametrize(("user", "own", "other"), [("nodes", "vmoco", "mlflow"), ("tracker", "mlflow", "vmoco")])
def test_a_key_to_the_store_is_limited_to_one_bucket(service: Service, user: str, own: str, other: str) -> None:
    """With the policies of this repository, nodes and tracker write, list and delete only in their own bucket."""
    trial = (
        "from vmoco import storage; import sys; place = f's3://{sys.argv[1]}/trial'; "
        "storage.write_atomic(place + '/x', b'1'); assert storage.list_files(place) == ['x']; "
        "storage.delete_folder(place)"
    )
    outside = service.hosts["outside"]
    command = f'cd {ROOT}; {BIN}/python -c "{trial}"'
    code, printed = outside.attempt(f"{command} {own}", environment=service.store_keys[user])
    assert code == 0, printed
    code, printed = outside.attempt(f"{command} {other}", environment=service.store_keys[user])
    assert code != 0
    assert "ACCESS_DENIED" in printed
