"""A Google store on this machine: an emulator in a process of its own, and the key of nobody to sign in with.

Of its own, because pyarrow asks the store whether a file is closed while it holds Python's lock: a server in the same
process could not answer.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

BUCKET = "bucket"


class GoogleStore:
    """The server; `environment` is what makes pyarrow find it, once per process.

    Args:
        folder: For the key.
    """

    def __init__(self, folder: Path) -> None:
        self._key = folder / "key.json"
        self.environment: dict[str, str] = {}

    def __enter__(self) -> GoogleStore:
        command = [sys.executable, "-m", "tests.google_store"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {"type": "service_account", "project_id": "none", "client_email": "nobody@example.com"}
        account |= {"client_id": "1", "private_key_id": "1", "private_key": key.decode(), "token_uri": f"{url}/token"}
        self._key.write_text(json.dumps(account))
        self.environment = {
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._key),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()


def _serve() -> None:
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    # The emulator's own server answers one connection at a time, and pyarrow keeps several.
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(RequestHandler, storage))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
