"""A proxy on this machine, before an object store's server, that does what networks and busy services do.

`Proxy(port)` passes requests on to 127.0.0.1:port. `plan` says what becomes of a request: a function of its number (from 1)
and itself, that returns one of FAULTS or "". `rate`: bytes a second, both ways together, None for no limit.
"""

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loopback import LoopbackServer

FAULTS = (
    "busy",  # an answer of 503, nothing done
    "broken",  # one of 500, nothing done
    "refused",  # hung up, nothing done
    "lost",  # all done, hung up before the answer
    "half",  # all done, half of the answer's bytes
    "late",  # all done, the answer long after nobody waits for it
    "wrong",  # a bit of the answer's bytes changed
    "twice",  # carried out twice, the second answer is told
    "stale",  # a listing as it was the first time
    "blind",  # without the conditions that were asked for
)
_HOPS = {"connection", "keep-alive", "transfer-encoding", "expect", "host", "content-length"}


@dataclass
class Request:
    """A request, its answer's status and the bytes that it moved."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    moved: int = field(default=0)

    @property
    def key(self) -> str:
        return self.path.partition("?")[0]

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type" in self.path


class Proxy(LoopbackServer):
    """The proxy; use it in a `with` statement. `requests` are those that have come, in order."""

    request_queue_size = 64

    def __init__(self, upstream: int, rate: float | None = None, late: float = 3.0) -> None:
        super().__init__(_Handler)
        self.upstream = upstream
        self.rate = rate
        self.late = late
        self.requests: list[Request] = []
        self.plan: Callable[[int, Request], str] = lambda n, request: ""
        self.listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self._lock = threading.Lock()
        self._free_at = 0.0

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""

    def fail(self, at: int, fault: str) -> None:
        """Let request number `at` from now on fail so, once."""
        self.requests.clear()
        self.plan = lambda n, request: fault if n == at else ""

    def well(self) -> None:
        self.requests.clear()
        self.plan = lambda n, request: ""

    def enter(self, request: Request) -> str:
        with self._lock:
            self.requests.append(request)
            return self.plan(len(self.requests), request)

    def move(self, request: Request, n: int) -> None:
        """Count bytes, and wait as long as they take on a link of that rate."""
        with self._lock:
            request.moved += n
            if self.rate is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + n / self.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        left, parts, request = int(self.headers.get("Content-Length") or 0), [], self._request
        while left and (part := self.rfile.read(min(left, 1 << 18))):
            parts.append(part)
            left -= len(part)
            self.server.move(request, len(part))
        return b"".join(parts)

    def _serve(self) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOPS}
        self._request = request = Request(self.command, self.path, headers, b"")
        request.body = self._body()
        fault = self.server.enter(request)
        if fault in ("busy", "broken"):
            self._answer(request, 503 if fault == "busy" else 500, [], b"")
            return
        if fault == "refused":
            self.close_connection = True
            return
        if fault == "blind":
            request.headers = {k: v for k, v in headers.items() if not k.lower().startswith("if-")}
        for _ in range(2 if fault == "twice" else 1):
            status, told, data = self._forward(request)
        if request.lists:
            first = self.server.listings.setdefault(request.path, (status, told, data))
            status, told, data = first if fault == "stale" else (status, told, data)
        if fault == "late":
            time.sleep(self.server.late)
        if fault in ("lost", "late"):
            self.close_connection = True
            return
        if fault == "wrong" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        self._answer(request, status, told, data, half=fault == "half")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)) as connection:
            host = {"Host": f"127.0.0.1:{self.server.upstream}", "Content-Length": str(len(request.body))}
            connection.request(request.method, request.path, request.body or None, {**request.headers, **host})
            answer = connection.getresponse()
            told = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOPS - {"content-length"}]
            return answer.status, told, answer.read()

    def _answer(self, request: Request, status: int, told: list[tuple[str, str]], data: bytes, half: bool = False) -> None:
        request.status = status
        self.send_response_only(status)
        for name, value in told:
            if request.method == "HEAD" or name.lower() != "content-length":
                self.send_header(name, value)
        if request.method != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        elif not told:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if half:
            data = data[: len(data) // 2]
            self.close_connection = True
        view = memoryview(data)
        while request.method != "HEAD" and view:
            self.server.move(request, len(view[: 1 << 18]))
            self.wfile.write(view[: 1 << 18])
            view = view[1 << 18 :]
