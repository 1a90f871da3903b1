"""Kubernetes, KubeRay and Ray's launcher accept every file in cluster/, and what the files refer to exists."""

from __future__ import annotations

import base64
import copy
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml

from vmoco.job_settings import IngestSettings
from vmoco.presets import PRESETS

ROOT = Path(__file__).parents[2]
KUBERNETES = sorted(ROOT.glob("cluster/kubernetes/*.yaml"))
MACHINES = sorted(ROOT.glob("cluster/machines/*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


ALL = [document for path in KUBERNETES for document in documents(path)]


def strict(schema: Any) -> Any:
    """The schema, changed to refuse unknown keys. The published one accepts misspelt keys."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def kuberay() -> dict[str, dict[str, Any]]:
    """Strict schemas of RayJob and RayCluster."""
    job = strict(json.loads((ROOT / "tests/cluster/schemas/ray.io_rayjobs_v1.json").read_text()))
    cluster = copy.deepcopy(job)
    cluster["properties"]["spec"] = job["properties"]["spec"]["properties"]["rayClusterSpec"]
    return {"RayJob": job, "RayCluster": cluster}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a document."""
    found = [node["template"] for node in walk(document) if "spec" in node.get("template", {})]
    found += [node["submitterPodTemplate"] for node in walk(document) if "submitterPodTemplate" in node]
    return [pod for pod in found if "containers" in pod["spec"]]


def identify(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


@pytest.mark.parametrize("document", ALL, ids=identify)
def test_kubernetes_accepts_it(document: dict[str, Any], kuberay: dict[str, dict[str, Any]]) -> None:
    """Each object and each pod in it satisfies its published schema and has no other keys."""
    if document["kind"] in kuberay:
        jsonschema.validate(document, kuberay[document["kind"]])
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    for pod in pods(document):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod["metadata"]}, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_key_is_noticed(kuberay: dict[str, dict[str, Any]]) -> None:
    """The strict schema refuses what the published one lets pass: an unknown key deep inside."""
    document = documents(ROOT / "cluster/kubernetes/raycluster-gpu.yaml")[0]
    container = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    with pytest.raises(jsonschema.ValidationError, match="'resource' was unexpected"):
        jsonschema.validate(document, kuberay["RayCluster"])


def test_every_pod_has_limits_few_rights_and_probes() -> None:
    """Each pod has requests and limits and runs without root. Each service also has probes."""
    for document in ALL:
        for pod in pods(document):
            assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, identify(document)
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                where = f"{identify(document)}: {container['name']}"
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, where
                assert "memory" in container["resources"]["limits"], where
                assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
                assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], where
            if document["kind"] in ("Deployment", "StatefulSet", "RayCluster"):
                assert {"readinessProbe", "livenessProbe"} <= pod["spec"]["containers"][0].keys(), identify(document)


def test_every_secret_is_generated_and_used() -> None:
    """docker/secrets.sh generates every Secret and key that a manifest names, and no other."""
    generated = subprocess.run([ROOT / "docker/secrets.sh", "kubernetes"], capture_output=True, text=True, check=True)
    secrets = {secret["metadata"]["name"]: secret["data"] for secret in yaml.safe_load_all(generated.stdout)}
    for name, data in secrets.items():
        for key, value in data.items():
            assert base64.b64decode(value, validate=True), f"{name}/{key} is empty"
    named = set()
    for node in (node for document in ALL for node in walk(document)):
        if "secretKeyRef" in node:
            reference = node["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]], reference
            named.add(reference["name"])
        if "secretName" in node:
            named.add(node["secretName"])
    assert named == secrets.keys()


def test_no_manifest_holds_a_secret() -> None:
    """A variable with the name of a secret takes its value from a Secret."""
    for node in (node for document in ALL for node in walk(document)):
        if any(word in str(node.get("name", "")) for word in ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY")):
            assert "value" not in node, node


def test_every_pod_has_a_policy_for_both_directions() -> None:
    """One rule forbids all traffic; each kind of pod has rules, by its label, for the traffic that it needs."""
    policies = [document["spec"] for document in ALL if document["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    selected = {tuple(policy["podSelector"].get("matchLabels", {}).values()) for policy in policies}
    for pod in (pod for document in ALL for pod in pods(document)):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        assert (component,) in selected, f"no policy for {component}"


def test_ports_without_authentication_are_closed() -> None:
    """Only the ports of the gateway are open to everybody."""
    open_to_all = set()
    for policy in (document for document in ALL if document["kind"] == "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            if "from" not in rule:
                open_to_all |= {(policy["metadata"]["name"], port["port"]) for port in rule["ports"]}
    assert open_to_all == {("gateway", 8443), ("gateway", 5443)}


def test_the_jobs_accept_the_entry_points() -> None:
    """The flags of each RayJob parse, and the pools are large enough for the workers that it asks for."""
    jobs = [document for document in ALL if document["kind"] == "RayJob"]
    assert len(jobs) == 3
    for job in jobs:
        python, script, *flags = shlex.split(job["spec"]["entrypoint"])
        assert python == "python"
        assert (ROOT / Path(script).relative_to("/vmoco")).is_file()
        if script.endswith("ingest.py"):
            tyro.cli(IngestSettings, args=flags)
            continue
        settings = tyro.extras.overridable_config_cli(PRESETS, args=flags)
        assert settings.scaling.wait_for_nodes
        assert settings.scaling.device != "auto"  # the nodes are not there yet
        kind = "gpu" if settings.scaling.use_gpu else "cpu"
        (cluster,) = documents(ROOT / f"cluster/kubernetes/raycluster-{kind}.yaml")
        (pool,) = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == kind]
        pod = pool["template"]["spec"]["containers"][0]["resources"]["requests"]
        per_pod = int(pod["cpu"]) // settings.scaling.cpus_per_worker
        if settings.scaling.use_gpu:
            per_pod = min(per_pod, int(pod["nvidia.com/gpu"]))
        assert settings.scaling.num_workers <= per_pod * pool["maxReplicas"]


def test_the_workers_of_a_machine_share_a_pod() -> None:
    """Between pods NCCL uses neither NVLink nor shared memory: the 8 workers of the job on GPUs fit into one."""
    (job,) = documents(ROOT / "cluster/kubernetes/rayjob-pretrain-gpu.yaml")
    settings = tyro.extras.overridable_config_cli(PRESETS, args=shlex.split(job["spec"]["entrypoint"])[2:])
    (cluster,) = documents(ROOT / "cluster/kubernetes/raycluster-gpu.yaml")
    (pool,) = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    pod = pool["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert int(pod["nvidia.com/gpu"]) == settings.scaling.num_workers == 8
    assert int(pod["cpu"]) >= settings.scaling.num_workers * settings.scaling.cpus_per_worker


def test_clusters_run_the_ray_of_the_lock_file() -> None:
    """`rayVersion` is the version in the image; KubeRay and the autoscaler rely on it."""
    pinned = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray==")]
    for document in (document for document in ALL if document["kind"] == "RayCluster"):
        assert pinned == [f"ray=={document['spec']['rayVersion']}"]


def test_only_the_init_container_sees_the_key_of_the_authority() -> None:
    """No container that runs jobs mounts the Secret with the authority's key."""
    for document in (document for document in ALL if document["kind"] == "RayCluster"):
        for pod in pods(document):
            volumes = {volume["name"]: volume.get("secret", {}).get("secretName") for volume in pod["spec"]["volumes"]}
            for container in pod["spec"]["containers"]:
                mounted = {volumes[mount["name"]] for mount in container["volumeMounts"]}
                assert "authority-certificate" in mounted
                assert "authority" not in mounted


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_the_launcher_accepts_it(path: Path) -> None:
    """Ray's own checks of `ray up` pass, and nodes start with token, TLS and the ports of the firewall rules."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(path.read_text())))
    misspelt = yaml.safe_load(path.read_text())
    misspelt["max_worker"] = misspelt.pop("max_workers")
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(misspelt))
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = yaml.safe_load(path.read_text())[start][-1]
        assert "node.env" in command
        assert "node.sh ray start" in command
        assert "--min-worker-port=20000 --max-worker-port=20999" in command
