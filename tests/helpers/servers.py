"""Servers on this machine, for what is read over a network."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with or without ranges, lists no folder, and fails as the server is set to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.path)  # type: ignore[attr-defined]
        failure = server.fail(self.path)  # type: ignore[attr-defined]
        if failure == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
            return
        file = Path(self.translate_path(self.path))
        if isinstance(failure, int) or not file.is_file():
            self.send_error(failure if isinstance(failure, int) else 404)
            return
        content = file.read_bytes()
        wanted = self.headers.get("Range") if server.has_ranges else None  # type: ignore[attr-defined]
        self.send_response(206 if wanted else 200)
        part = content
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            part = content[start : int(last) + 1 if first and last else None]
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if failure == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(part)


@contextmanager
def serve_http(folder: Path, *, has_ranges: bool = True) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server of a folder. ``fail(path)`` may be replaced: it gives "drop", "cut", a status, or None.

    ``address`` is that of the folder, ``requests`` the paths requested so far.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    server.requests, server.fail, server.has_ranges = [], lambda path: None, has_ranges
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fail_times(times: int, failure: str | int, part: str = ""):
    """A function for ``fail``: the first requests of each path with this part fail."""
    counts: dict[str, int] = {}

    def fail(path: str) -> str | int | None:
        if part not in path:
            return None
        counts[path] = counts.get(path, 0) + 1
        return failure if counts[path] <= times else None

    return fail


@contextmanager
def serve_s3() -> Iterator[str]:
    """A server of S3 with a public bucket; gives its address."""
    server_of_moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[s3]' flask flask-cors")
    server = server_of_moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()
