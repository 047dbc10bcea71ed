"""An S3 server on this machine, moto's, that can be made to fail, and that tests can look into."""

import contextlib
import io
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any, Literal, NamedTuple

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import make_server

BUCKET = "bucket"
_CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")


class Request(NamedTuple):
    method: str
    key: str
    """Without the bucket."""
    body: bytes
    if_match: str


Fault = Literal["refused", "failed", "dropped", "lost"] | None
"""What becomes of a request; None: nothing in particular.

"refused": it is answered with 500 and not carried out. "failed": it is carried out, and answered
with 500. "dropped": the connection ends before it is carried out. "lost": it ends afterwards.
"""
FAULTS: tuple[Fault, ...] = ("refused", "failed", "dropped", "lost")


class S3Server:
    """Two requests are never carried out at once, so that conditions hold as they do in S3."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.fault: Callable[[Request], Fault] = lambda _: None
        self.requests: list[Request] = []
        self.heeds_conditions = True
        self._one_at_a_time = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.options = {
            "aws_access_key_id": "anyone",
            "aws_secret_access_key": "anything",
            "aws_region": "us-east-1",
            "aws_endpoint": f"http://127.0.0.1:{self._server.server_port}",
            "allow_http": "true",
            "client_max_retries": "2",
        }
        config: Any = {name: self.options[name] for name in self.options if name[:4] == "aws_"}
        self.store = S3Store(BUCKET, config=config, client_options={"allow_http": True})
        self._places = 0
        with contextlib.closing(HTTPConnection("127.0.0.1", self._server.server_port)) as made:
            made.request("PUT", f"/{BUCKET}", headers={"Content-Length": "0"})
            assert made.getresponse().status == 200

    def place(self) -> str:
        """The URI of a folder in which there is nothing."""
        self._places += 1
        return f"s3://{BUCKET}/{self._places}"

    def objects(self, folder: str = "") -> dict[str, int]:
        """The size of each object in a folder."""
        return {
            found["path"]: found["size"]
            for some in self.store.list(folder or None)
            for found in some
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        environ["wsgi.input"] = io.BytesIO(body)
        if not self.heeds_conditions:
            environ = {name: environ[name] for name in environ if name not in _CONDITIONS}
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"].removeprefix(f"/{BUCKET}").strip("/"),
            body,
            environ.get("HTTP_IF_MATCH", ""),
        )
        fault = self.fault(request)
        self.requests.append(request)
        if fault == "dropped":
            return _hung_up(environ)
        answer: list[bytes] = []
        if fault != "refused":
            with self._one_at_a_time:
                answer = list(self._app(environ, start_response if fault is None else _unsaid))
        if fault == "lost":
            return _hung_up(environ)
        if fault is not None:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            answer = []
        return iter(answer)


def _unsaid(status: str, headers: Any, error: Any = None) -> None:
    """What a server would begin its answer with."""


def _hung_up(environ: dict[str, Any]) -> Iterator[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError
