"""A hub to fetch from, and small files to put there or into a mirror."""

from __future__ import annotations

import http.server
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/stories"


def parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in for the Hugging Face hub: its API, its redirect to a CDN, ranges, and its ways to fail.

    ``break_at``: the CDN drops the connection after so many bytes, once for each entry. ``requests`` lists
    what was asked: (method, path, Range header).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.break_at: list[int] = []
        self.broken = False  # answers 500 to everything
        self.gated = False
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.broken:
            self._send(500)
        elif path.startswith("/cdn/"):
            self._cdn(hub.files[path.removeprefix("/cdn/")])
        elif path.startswith(f"/api/datasets/{REPO}/revision/"):
            self._revision(path.rpartition("/revision/")[2])
        elif path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self._resolve(path.rpartition(f"/{COMMIT}/")[2])
        else:
            self._send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _revision(self, revision: str) -> None:
        if revision not in (COMMIT, "main"):
            self._send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        siblings = [{"rfilename": name} for name in self.server.files]
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False}).encode()
        self._send(200, body, Content_Type="application/json")

    def _resolve(self, name: str) -> None:
        if self.server.gated:
            self._send(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif name not in self.server.files:
            self._send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:
            content = self.server.files[name]
            self._send(
                302,
                # Another host, as the CDN is: what the client must know is in this answer.
                Location=f"http://localhost:{self.server.server_port}/cdn/{name}",
                X_Repo_Commit=COMMIT,
                X_Linked_Etag=f'"{hash(content)}"',
                X_Linked_Size=str(len(content)),
                ETag='"redirect"',
            )

    def _cdn(self, content: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = content[start:]
        if self.command == "GET" and self.server.break_at:
            end = self.server.break_at.pop(0)
            self._send(206 if start else 200, rest[:end], Content_Length=str(len(rest)))
            self.close_connection = True
            self.connection.close()
            return
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._send(206 if start else 200, rest, **headers)
