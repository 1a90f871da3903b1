"""An S3 store on this machine (moto's server) that fails when it is told to."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match, instead of or before an answer."""

    method: str
    path: str
    """Regular expression, searched in the path."""
    times: int
    status: str = ""
    """Answer, such as `500 Internal Server Error`; empty where the request is only slow."""
    seconds: float = 0.0
    """Wait before the answer."""


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class Store:
    """The server; `environment` is what makes pyarrow find it."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Silent)
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Store:
        self._thread.start()
        # moto keeps its objects in the process; those of an earlier store are none of ours.
        reset = urllib.request.Request(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def names(self, prefix: str = "") -> list[str]:
        """All objects, also such as no listing of a data set shows."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return sorted(entry["Key"] for entry in found.get("Contents", []))

    def content(self, name: str) -> bytes:
        found: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return found

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append((method, path))
            fault = next((f for f in self.faults if f.times and f.method == method and re.search(f.path, path)), None)
            if fault:
                fault.times -= 1
        if fault:
            time.sleep(fault.seconds)
            if fault.status:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                code = "AccessDenied" if fault.status.startswith("403") else "InternalError"
                start(fault.status, [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        return self._app(environ, start)  # type: ignore[no-any-return]
