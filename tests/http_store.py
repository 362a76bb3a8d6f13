"""A folder behind HTTP, in the manner of WebHDFS, which fsspec reads: on the loopback, and as broken as is wanted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PREFIX = "/webhdfs/v1"


class Store(ThreadingHTTPServer):
    """`fault` decides what is wrong with the answer to a request for a file's content: "drop", "503", "403", "stall",
    "half", "altered", or "" for nothing. It gets the path, and how many requests for it there were before."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault = lambda path, before: ""
        self.requests: dict[str, int] = {}
        self.stall_seconds = 1.5

    @property
    def url(self) -> str:
        """Of the folder, for fsspec."""
        return f"webhdfs://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_: object) -> None:
        """A client that has given up is no matter for the terminal."""


class _Handler(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        name, query = unquote(parts.path).removeprefix(PREFIX).strip("/"), parse_qs(parts.query)
        path = self.server.folder / name
        if not path.exists():
            error = {"RemoteException": {"exception": "FileNotFoundException", "message": name}}
            self._answer(404, json.dumps(error).encode())
        elif query["op"] == ["GETFILESTATUS"]:
            self._answer(200, json.dumps({"FileStatus": _status(path)}).encode())
        elif query["op"] == ["LISTSTATUS"]:
            found = [_status(entry) for entry in sorted(path.iterdir())]
            self._answer(200, json.dumps({"FileStatuses": {"FileStatus": found}}).encode())
        else:
            offset, length = int(query["offset"][0]), int(query["length"][0])
            self._content(name, path.read_bytes()[offset : offset + length])

    def _content(self, name: str, data: bytes) -> None:
        before = self.server.requests.get(name, 0)
        self.server.requests[name] = before + 1
        fault = self.server.fault(name, before)
        if fault == "drop":
            self.connection.close()
        elif fault in ("503", "403"):
            self._answer(int(fault), b"")
        elif fault == "stall":
            time.sleep(self.server.stall_seconds)
        elif fault == "half":
            self._answer(200, data, len(data) // 2)
            self.connection.close()
        else:
            self._answer(200, bytes([data[0] ^ 1]) + data[1:] if fault == "altered" else data)

    def _answer(self, status: int, data: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:sent])
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def _status(path: Path) -> dict[str, object]:
    kind = "DIRECTORY" if path.is_dir() else "FILE"
    return {"pathSuffix": path.name, "type": kind, "length": path.stat().st_size}


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """The store of a folder, for as long as the context is open."""
    with Store(folder) as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
