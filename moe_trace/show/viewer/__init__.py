"""One trace in chrome://tracing's viewer, served on this machine without internet.

The viewer itself is the one included in torch-tb-profiler. chrome://tracing is disabled by default in current
Chromium, and Perfetto's page has to be loaded from the internet.
"""

from __future__ import annotations

import importlib.util
import os
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, urlsplit

_DIRECTORY = Path(__file__).parent
_VIEWER = "trace_viewer_full.html"
_GZIP_MAGIC = b"\x1f\x8b"


def find_trace_viewer() -> Path | None:
    """Return the viewer's page in the installed torch-tb-profiler, without importing it, or None."""
    spec = importlib.util.find_spec("torch_tb_profiler")
    if spec is None or spec.origin is None:
        return None
    page = Path(spec.origin).parent / "static" / _VIEWER
    return page if page.is_file() else None


class TraceServer(ThreadingHTTPServer):
    """Server of the viewer's three files and the trace; everything else is not found.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, trace: Path, viewer: Path, *, host: str, port: int) -> None:
        self.trace = trace
        self.files = {
            "/": (_DIRECTORY / "index.html", "text/html; charset=utf-8"),
            "/webcomponents.min.js": (_DIRECTORY / "webcomponents.min.js", "text/javascript"),
            f"/{_VIEWER}": (viewer, "text/html; charset=utf-8"),
            "/trace.json": (trace, "application/json"),
        }
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        """URL to open in a browser."""
        return f"http://localhost:{self.server_address[1]}/?trace={quote(os.fsencode(self.trace.name))}"


class _Handler(BaseHTTPRequestHandler):
    server: TraceServer

    def do_GET(self) -> None:
        # A foreign page whose host name resolves to this machine (DNS rebinding) must not read the trace.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        found = self.server.files.get(urlsplit(self.path).path)
        if host not in ("localhost", "127.0.0.1") or found is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        path, kind = found
        try:
            content = path.read_bytes()
        except OSError:
            return self.send_error(HTTPStatus.NOT_FOUND, "the file has gone")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if content[:2] == _GZIP_MAGIC:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: the address is all that a user needs to see."""
