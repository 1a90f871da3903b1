"""Compose accepts docker/compose.yaml. It publishes only the gateway, and docker/secrets.sh makes its secrets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker/compose.yaml"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def generate(platform: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "docker/secrets.sh"), platform, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def generated() -> dict[str, str]:
    """The variables of the env file, as Compose reads them: a value in quotes may have several lines."""
    return dict(re.findall(r"^(\w+)='(.*?)'$", generate("compose").stdout, flags=re.MULTILINE | re.DOTALL))


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_accepts_it(tmp_path: Path) -> None:
    """The published schema of Compose takes the file, and refuses it with a misspelt key."""
    assert check(COMPOSE).returncode == 0, check(COMPOSE).stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("healthcheck:", "heathcheck:"))
    assert "heathcheck" in check(wrong).stdout


def test_every_variable_is_generated_and_every_secret_used() -> None:
    """The env file holds exactly the variables that the file uses, with new values each time."""
    text = COMPOSE.read_text()
    asked = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"\{environment: (\w+)\}", text))
    first, second = generated(), generated()
    assert asked - {"GATEWAY_ADDRESS"} == first.keys()
    assert [name for name in first if first[name] == second[name]] == ["GATEWAY_HOSTS"]
    assert all(len(first[name]) >= 20 for name in first if name != "GATEWAY_HOSTS")


def test_only_the_gateway_is_published_and_by_default_to_this_machine(services: dict[str, dict[str, Any]]) -> None:
    """No other service has ports, and the gateway's are on 127.0.0.1 unless GATEWAY_ADDRESS changes it."""
    assert [name for name in services if "ports" in services[name]] == ["gateway"]
    assert services["gateway"]["ports"] == [
        "${GATEWAY_ADDRESS:-127.0.0.1}:8443:8443",
        "${GATEWAY_ADDRESS:-127.0.0.1}:5443:5443",
    ]
    assert services["postgres"]["networks"] == ["database"]


def test_every_service_has_a_health_check(services: dict[str, dict[str, Any]]) -> None:
    """Each service has its own check or that of our image. Only `setup`, which ends, has none."""
    for name, service in services.items():
        if name == "setup":
            assert service["healthcheck"] == {"disable": True}
        else:
            assert service["image"].startswith("vmoco:") or service["healthcheck"]["test"][0] == "CMD", name


def test_the_env_file_is_never_committed() -> None:
    """git ignores it, so neither a commit nor the upload of a job contains it."""
    subprocess.run(["git", "check-ignore", "--quiet", "docker/.env"], cwd=ROOT, check=True)


def test_names_of_the_gateway_are_in_its_certificate_and_allowed(tmp_path: Path) -> None:
    """GATEWAY_NAMES adds names and addresses to the certificate and to the hosts that the tracker answers to."""
    folder = tmp_path / "secrets"
    done = generate("machines", str(folder), GATEWAY_NAMES="head.lab 192.0.2.10")
    assert done.returncode == 0, done.stderr
    command = ["openssl", "x509", "-in", folder / "gateway.crt", "-noout", "-ext", "subjectAltName"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "DNS:localhost, IP Address:127.0.0.1, DNS:gateway, DNS:head.lab, IP Address:192.0.2.10" in names
    command = ["openssl", "verify", "-CAfile", folder / "ca.crt", folder / "gateway.crt"]
    subprocess.run(command, capture_output=True, check=True)
    assert "head.lab:5443,192.0.2.10:5443" in (folder / "tracker.env").read_text()
    assert "https://head.lab:8443" in (folder / "client.env").read_text()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    again = generate("machines", str(folder))
    assert again.returncode == 1
    assert "already exists: choose another folder" in again.stderr


def test_an_unknown_format_is_refused() -> None:
    """The message lists the formats that exist."""
    done = generate("swarm")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: 'swarm' is not a format: choose compose, kubernetes or machines\n"


def test_caddy_accepts_the_gateway(tmp_path: Path) -> None:
    """`caddy validate` accepts docker/Caddyfile."""
    assert generate("machines", str(tmp_path / "secrets")).returncode == 0
    environment = os.environ | {
        name: str(tmp_path / f"secrets/gateway.{end}")
        for name, end in (("GATEWAY_CERTIFICATE", "crt"), ("GATEWAY_KEY", "key"))
    }
    environment["XDG_CONFIG_HOME"] = environment["XDG_DATA_HOME"] = str(tmp_path)
    command = [BIN / "caddy", "validate", "--adapter", "caddyfile", "--config", ROOT / "docker/Caddyfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
