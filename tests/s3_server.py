"""A real S3 API server on loopback, and a proxy before it that breaks what it is told to."""

import http.client
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.pool import free_port
from tests.support import wait_until

__all__ = ["BreakingProxy", "s3_server"]

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server in a process of its own; yields its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        assert process.poll() is None
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("PUT", "/bucket")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    try:
        wait_until(answers, 60.0, 0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


class BreakingProxy:
    """Passes requests on; answers those that match a pattern with 500 instead, as often as told.

    Attributes:
        broken: how many requests were answered so.
        seen: method and path of every request.
    """

    def __init__(self, target: int) -> None:
        self.broken = 0
        self.seen: list[str] = []
        self._pattern: re.Pattern[str] | None = None
        self._times = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args: Any) -> None:
                """Quiet."""

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                if proxy._breaks(f"{self.command} {self.path}"):
                    return self._answer(500, {}, b"")
                connection = http.client.HTTPConnection("127.0.0.1", target, timeout=30)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    return self._answer(answer.status, dict(answer.getheaders()), answer.read())
                finally:
                    connection.close()

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _breaks(self, request: str) -> bool:
        with self._lock:
            self.seen.append(request)
            if self._pattern is None or self._times <= 0 or not self._pattern.search(request):
                return False
            self._times -= 1
            self.broken += 1
            return True

    def break_next(self, pattern: str, times: int) -> None:
        """From now on, so many requests whose "METHOD path" matches fail."""
        with self._lock:
            self._pattern, self._times = re.compile(pattern), times

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
