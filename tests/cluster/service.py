"""A whole service on several hosts, started as cluster/README.md says for bare machines.

Hosts: `services` (PostgreSQL, MLflow server, S3 store, gateway), `head`, workers, and `outside`, which only submits.
docker/secrets.sh generates every secret, each host has its own copy of the files that it needs, and the store enforces
the policies of cluster/machines/policies.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import Host, Network, wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# The ports that cluster/machines/*.yaml names, so that a firewall can know them.
PORTS = (
    "--node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 "
    "--dashboard-agent-grpc-port=6383 --metrics-export-port=8080 "
    "--min-worker-port=20000 --max-worker-port=20999 --object-store-memory=100000000"
)

# How fast a lost node is noticed: the README's values for the head.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}

# Users of the store: an administrator for the setup, and one for each policy. Prints name, key and secret.
STORE_USERS = """
import boto3, json, pathlib, sys
iam = boto3.client("iam", "us-east-1", endpoint_url=sys.argv[1], aws_access_key_id="none", aws_secret_access_key="none")
everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
for name in ("admin", "nodes", "tracker"):
    file = pathlib.Path(sys.argv[2], f"{name}.json")
    iam.create_user(UserName=name)
    policy = json.loads(file.read_text()) if file.exists() else everything
    # For deleting several objects at once moto, unlike AWS, wants the right on the bucket and not on what is in it, and
    # for a look at the bucket a right of that name, where AWS asks for the right to list it.
    bucket, actions = policy["Statement"][0]["Resource"], ["s3:DeleteObject", "s3:HeadBucket"]
    policy["Statement"].append({"Effect": "Allow", "Action": actions, "Resource": bucket})
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    print(name, key["AccessKeyId"], key["SecretAccessKey"])
"""


def postgres_folder() -> Path | None:
    """Folder of PostgreSQL's server programs, which Debian does not put on the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return places[-1].parent if places else None


class Service:
    """The running service.

    Attributes:
        network: that its hosts are on.
        hosts: by name.
        secrets: folder that docker/secrets.sh wrote.
        disk: a path at which each node has a disk of its own.
        shared: a folder that all hosts share.
        store_keys: environment of each user of the store.
    """

    def __init__(self, folder: Path, network: Network) -> None:
        self._folder = folder
        self.network = network
        self.hosts = network.hosts
        self.secrets = folder / "secrets"
        self.disk = folder / "disk"
        self.shared = folder / "shared"
        self.store_keys: dict[str, dict[str, str]] = {}

    def start(self, workers: tuple[str, ...], *, only_ray: bool = False) -> None:
        """Starts everything, or Ray and the gateway alone; returns when head and workers are one cluster."""
        self.disk.mkdir()
        self.shared.mkdir()
        services, head, outside = (self.network.add(name) for name in ("services", "head", "outside"))
        names = {"GATEWAY_NAMES": services.address}
        outside.run(f"{ROOT}/docker/secrets.sh machines {self.secrets}", environment=names)
        for name in ("client.env", "token", "ca.crt"):
            shutil.copy2(self.secrets / name, outside.folder)
        if not only_ray:
            self._start_database(services)
            self._start_store(services)
            self.start_tracker()
            self._setup(services)
        self._start_gateway(services, head)
        self.start_node(head, f"--head --port=6379 --dashboard-host={head.address} --dashboard-port=8265 --num-cpus=0")
        for name in workers:
            self.add_worker(name)
        self.wait_for_nodes(1 + len(workers))

    def add_worker(self, name: str, *, before: str = "") -> Host:
        """One more host that joins the cluster.

        Args:
            name: of the host.
            before: what its start script does first; what it mounts, only this node sees.
        """
        host = self.network.add(name)
        self.start_node(host, f"--address={self.hosts['head'].address}:6379 --num-cpus=1", before=before)
        return host

    def start_node(self, host: Host, flags: str, *, before: str = "") -> None:
        """`ray start` with the host's own copy of the secrets; each node has its own `disk`."""
        self.node_secrets(host)
        store = self.store_keys.get("nodes", {}) | {"GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{BIN}:{os.environ['PATH']}"}
        host.start(
            f"{before}\nmount -t tmpfs none {self.disk}; source {host.folder}/node.env; "
            f"exec {ROOT}/docker/node.sh ray start --block {flags} {PORTS} "
            f"--node-ip-address={host.address} --temp-dir={host.folder}/ray",
            log="ray.log",
            environment=store | HEALTH,
        )
        if "--head" in flags:
            ready = host.folder / "ray/ray_current_cluster"
            wait_until(ready.exists, what="the head is up", seconds=120, blame=lambda: host.said("ray.log"))

    def node_secrets(self, host: Host) -> Path:
        """Copies the files that `ray start` needs to a host; returns their folder."""
        for name in ("node.env", "token", "ca.crt", "ca.key"):
            shutil.copy2(self.secrets / name, host.folder)
        return host.folder

    def alive(self) -> list[str]:
        """Addresses of the live nodes, by the head; empty if it does not answer."""
        head = self.hosts["head"]
        ask = (
            "import ray; ray.init(address='auto', logging_level=50); "
            "print('alive', *[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"
        )
        auto = {"RAY_ADDRESS": f"{head.address}:6379"}
        _, said = head.attempt(f'source {head.folder}/node.env; {BIN}/python -c "{ask}"', environment=auto)
        return next((line.split()[1:] for line in said.splitlines() if line.startswith("alive ")), [])

    def wait_for_nodes(self, number: int) -> None:
        """Waits until this number of nodes is alive."""
        head = self.hosts["head"]
        wait_until(
            lambda: len(self.alive()) == number,
            what=f"{number} nodes",
            seconds=120,
            blame=lambda: head.said("ray.log"),
        )

    def submit(self, *entrypoint: str, timeout: float = 240) -> tuple[int, str]:
        """Submits a job from outside, through the gateway, as a user would; returns exit code and output."""
        return self.hosts["outside"].attempt(self.submission(*entrypoint), timeout=timeout)

    def submission(self, *entrypoint: str) -> str:
        """The script that `outside` runs to submit a job and follow it."""
        folder = self.hosts["outside"].folder
        submit = f"{BIN}/ray job submit --verify {folder}/ca.crt --working-dir {ROOT}"
        return f"source {folder}/client.env; exec {submit} -- {' '.join(entrypoint)}"

    def _start_database(self, host: Host) -> None:
        data = host.folder / "database"
        user = pwd.getpwnam("postgres")
        data.mkdir()
        os.chown(data, user.pw_uid, user.pw_gid)
        host.run(
            f"{self.sudo}cd {data}; sudo -u postgres {postgres_folder()}/initdb --pgdata={data} --auth-local=peer "
            "--auth-host=scram-sha-256 --no-sync"
        )
        with open(data / "pg_hba.conf", "a") as rules:
            rules.write(f"host all mlflow {host.address}/32 scram-sha-256\n")
        host.start(
            f"{self.sudo}cd {data}; sudo -u postgres {postgres_folder()}/postgres -D {data} "
            f"-c listen_addresses={host.address} -c unix_socket_directories={data} -c fsync=off",
            log="database.log",
        )
        make = (
            "sudo -u postgres psql -c \"create role mlflow login password '$PGPASSWORD'\" "
            '-c "create database mlflow owner mlflow"'
        )
        assert make in (ROOT / "cluster/README.md").read_text()
        wait_until(
            lambda: self.on_database(make)[0] == 0,
            what="the database is up",
            seconds=60,
            blame=lambda: host.said("database.log") + self.on_database(make)[1],
        )

    def _start_store(self, host: Host) -> None:
        # After the 9 requests that make its users, moto asks for a signature and obeys the policies.
        host.start(
            f"exec {BIN}/moto_server -H {host.address} -p 8333",
            log="store.log",
            environment={"INITIAL_NO_AUTH_ACTION_COUNT": "9"},
        )
        url = f"http://{host.address}:8333"
        ask = f"{BIN}/python -c \"import socket; socket.create_connection(('{host.address}', 8333), 1)\""
        wait_until(lambda: host.attempt(ask)[0] == 0, what="the store is up", seconds=60)
        (host.folder / "users.py").write_text(STORE_USERS)
        for line in host.run(f"{BIN}/python users.py {url} {ROOT}/cluster/machines/policies").splitlines():
            name, key, secret = line.split()
            self.store_keys[name] = {
                "AWS_ENDPOINT_URL": url,
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
            }

    def start_tracker(self) -> None:
        """Starts the MLflow server."""
        host = self.hosts["services"]
        config = f"MLFLOW_AUTH_CONFIG_PATH={ROOT}/docker/mlflow-auth.ini"
        tracker = host.start(
            f"source {self.secrets}/tracker.env; export PGHOST={host.address} {config}; exec {BIN}/mlflow server "
            "--host 127.0.0.1 --port 5000 --workers 1 --app-name basic-auth "
            "--backend-store-uri postgresql+psycopg:///mlflow --artifacts-destination s3://mlflow",
            log="tracker.log",
            environment=self.store_keys["tracker"],
        )
        self._tracker = tracker
        ask = f"{BIN}/python -c \"import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health')\""
        wait_until(
            lambda: host.attempt(ask)[0] == 0,
            what="the tracker is up",
            seconds=150,
            blame=lambda: host.said("tracker.log"),
        )

    @property
    def sudo(self) -> str:
        """Start of a script in which `sudo -u postgres` works without sudo, and finds the database's socket."""
        data = self.hosts["services"].folder / "database"
        drop = "setpriv --reuid=postgres --regid=postgres --clear-groups"
        return f'sudo() {{ shift 2; PGHOST={data} PGUSER=postgres {drop} "$@"; }}; '

    def on_database(self, script: str, *, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Runs a script on the tracker's machine as its administrator does; exit code and output."""
        host = self.hosts["services"]
        prelude = (
            f"{self.sudo}export PATH={BIN}:$PATH; source {self.secrets}/tracker.env; export PGHOST={host.address}; "
        )
        return host.attempt(prelude + script, environment=environment)

    def stop_tracker(self) -> None:
        """Ends the MLflow server, with its processes."""
        os.killpg(self._tracker.pid, signal.SIGTERM)
        self._tracker.wait(timeout=60)

    def _start_gateway(self, host: Host, head: Host) -> None:
        host.start(
            f"source {self.secrets}/tracker.env; export JOB_SERVER={head.address}:8265; "
            f"exec {BIN}/caddy run --adapter caddyfile --config {ROOT}/docker/Caddyfile",
            log="gateway.log",
            environment={"HOME": str(host.folder)},
        )

    def _setup(self, host: Host) -> None:
        host.run(
            f"source {self.secrets}/tracker.env; cd {ROOT}; "
            f"{BIN}/python jobs/setup.py --buckets vmoco mlflow --tracker http://127.0.0.1:5000",
            environment=self.store_keys["admin"],
        )


@contextmanager
def running(*workers: str, only_ray: bool = False) -> Iterator[Service]:
    """A service with workers of these names; all of it is gone afterwards."""
    # Short, because it contains sockets, and readable, because PostgreSQL runs as another user.
    folder = Path(tempfile.mkdtemp(prefix="vmoco-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        with Network(folder) as network:
            service = Service(folder, network)
            service.start(workers, only_ray=only_ray)
            yield service
    finally:
        shutil.rmtree(folder, ignore_errors=True)
