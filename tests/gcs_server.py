"""As much of Google's storage service as a store asks of it: objects with generations, conditions, ranges, listings.

No uploads in parts: gcsfs makes them of files of 5 MB and more.
"""

import http.server
import json
import re
import threading
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import LoopbackServer


class Gcs(LoopbackServer):
    """The service; use it in a `with` statement. `objects`: (generation, bytes) by bucket/name; `requests`: what was asked."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.generation = 1000
        self.lock = threading.Lock()
        self.ignores_conditions = False

    def put(self, name: str, asked: dict[str, str], data: bytes) -> bool:
        """Write an object unless its generation is another than was asked for."""
        with self.lock:
            stands = self.objects.get(name, (0, b""))[0]
            if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != stands and not self.ignores_conditions:
                return False
            self.generation += 1
            self.objects[name] = self.generation, bytes(data)
            return True

    def about(self, name: str) -> dict[str, Any]:
        generation, data = self.objects[name]
        bucket, _, key = name.partition("/")
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(data)), "generation": str(generation),
            "updated": when, "timeCreated": when,
        }  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gcs

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        where = urlsplit(self.path)
        asked = {k: v[0] for k, v in parse_qs(where.query).items()}
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", where.path)
        if found is None:
            self._json(404, {"error": {"message": "no such thing"}})
            return
        how, bucket, key = found[1], unquote(found[2]), unquote(found[3] or "")
        if how == "/upload":
            self._upload(bucket, asked, body)
        elif not key:
            self._list(bucket, asked)
        elif f"{bucket}/{key}" not in self.server.objects:
            self._json(404, {"error": {"message": "no such object"}})
        elif self.command == "DELETE":
            del self.server.objects[f"{bucket}/{key}"]
            self._answer(204, b"")
        elif how == "/download":
            self._download(f"{bucket}/{key}")
        else:
            self._json(200, self.server.about(f"{bucket}/{key}"))

    do_GET = do_PUT = do_POST = do_DELETE = _serve

    def _upload(self, bucket: str, asked: dict[str, str], body: bytes) -> None:
        kind = asked.get("uploadType")
        if kind == "media":
            name = f"{bucket}/{asked['name']}"
        else:
            told = Message()
            told["Content-Type"] = self.headers["Content-Type"]
            mark = b"--" + str(told.get_boundary()).encode()
            _, about, rest = body.split(mark, 2)
            key = json.loads(about.partition(b"\n\n")[2])["name"]
            name = f"{bucket}/{key}"
            body = rest.partition(b"\n\n")[2].rpartition(b"\n" + mark + b"--")[0]
        if self.server.put(name, asked, body):
            self._json(200, self.server.about(name))
        else:
            self._json(412, {"error": {"message": "conditionNotMet"}})

    def _download(self, name: str) -> None:
        generation, data = self.server.objects[name]
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        data = data[int(part[1]) : int(part[2]) + 1] if part else data
        self._answer(206 if part else 200, data, **{"X-Goog-Generation": str(generation)})

    def _list(self, bucket: str, asked: dict[str, str]) -> None:
        prefix, end = f"{bucket}/{asked.get('prefix', '')}", asked.get("delimiter", "")
        names = [n for n in sorted(self.server.objects) if n.startswith(prefix)]
        below = [n for n in names if end and end in n[len(prefix) :]]
        folders = {n[len(bucket) + 1 : n.index(end, len(prefix)) + 1] for n in below}
        items = [self.server.about(n) for n in names if n not in below]
        self._json(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def _json(self, status: int, body: Any) -> None:
        self._answer(status, json.dumps(body).encode(), **{"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
