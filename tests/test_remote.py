"""Archives behind URLs: ranged requests, few of them, and never wrong bytes from a server that misbehaves."""

import http.server
import math
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from forge import noise, safetensors_bytes, weights

import tzip
from tzip.cli import cli
from tzip.coders.errors import TzipError, UsageError
from tzip.formats import remote

MIB = 1 << 20
BIG = noise(20 * MIB)  # five chunks that do not shrink
SMALL = weights(3000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `requests` has the (method, range) of each; `fault` names what is wrong with it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, tuple[int, int] | None]] = []
        self.fault = ""

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first byte and the end of what was asked for; a request for everything fails the test."""
        asked = [(method, part) for method, part in self.requests if method != "HEAD"]
        assert all(part is not None for _, part in asked), asked
        return [part for _, part in asked if part is not None]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        self.server.requests.append((self.command, (int(asked[1]), int(asked[2]) + 1) if asked else None))
        data = self.server.files.get(self.path[1:])
        fault = self.server.fault
        if data is None:
            self.head(404, 0)
            return
        if fault == "error" and body:
            self.head(500, 0)
            return
        if fault == "refused" and body:
            self.head(403, 0)
            return
        if fault == "sizeless" and not body:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            return
        if asked and fault not in ("no ranges", "sizeless"):
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            part, status = data[begin:end], 206
        else:
            begin, end, part, status = 0, len(data), data, 200
        if fault == "too few" and status == 206:
            part = part[: len(part) // 2]
        if fault == "elsewhere" and status == 206:
            part = data[: len(part)]
        if fault == "damaged" and status == 206:
            part = bytes(b ^ 1 for b in part[:64]) + part[64:]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        if fault not in ("no ranges", "sizeless"):
            self.send_header("Accept-Ranges", "bytes")
        if fault == "sizeless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
        if fault in ("cut", "sizeless"):
            self.close_connection = True

    def head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def model() -> bytes:
    return safetensors_bytes([("big", "F32", [5, MIB], BIG), ("w", "BF16", [300, 10], SMALL)], {"format": "pt"})


@pytest.fixture(scope="module")
def archive(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("remote")
    (folder / "m.safetensors").write_bytes(model)
    tzip.pack(folder / "m.safetensors", folder / "m.tzip", level="fast")
    return (folder / "m.tzip").read_bytes()


def packed(folder: Path, tensors: list[tuple[str, str, list[int], bytes]]) -> bytes:
    (folder / "m.safetensors").write_bytes(safetensors_bytes(tensors))
    tzip.pack(folder / "m.safetensors", folder / "m.tzip")
    return (folder / "m.tzip").read_bytes()


# ---------------------------------------------------------------- what is asked for


def test_opening_asks_for_the_size_the_tail_and_the_header(server: Server, archive: bytes) -> None:
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        assert [(t.name, t.dtype, t.shape) for t in opened.tensors()] == [("big", "F32", (5, MIB)), ("w", "BF16", (300, 10))]
        assert [m.name for m in opened.members()] == ["m.safetensors"]
    assert len(server.requests) <= 3, server.requests
    assert sum(end - begin for begin, end in server.ranges()) <= 66_000


def test_an_index_larger_than_the_tail_is_one_request_more(server: Server, tmp_path: Path) -> None:
    names = [sha256(b"%d" % i).hexdigest() for i in range(4000)]
    server.files["m.tzip"] = packed(tmp_path, [(name, "U8", [1], bytes([i % 256])) for i, name in enumerate(names)])
    with tzip.open(server.url("m.tzip")) as opened:
        assert list(opened) == names
        assert len(server.requests) <= 4, server.requests
        assert len(server.ranges()) >= 3  # the index is not in the tail, or this test proves nothing
        assert opened[names[77]].tobytes() == bytes([77])


def test_a_tensor_of_many_chunks_comes_in_spans(server: Server, archive: bytes) -> None:
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.requests.clear()
        assert opened["big"].tobytes() == BIG
    asked = sorted(server.ranges())
    assert len(asked) == math.ceil(len(BIG) / remote.SPAN) == 2
    assert all(end - begin <= remote.SPAN for begin, end in asked)
    assert all(before[1] <= after[0] for before, after in pairwise(asked))  # nothing twice
    assert sum(end - begin for begin, end in asked) <= len(BIG) + 5 * 4096


@pytest.mark.parametrize(("span", "requests"), [(5 * MIB, 5), (9 * MIB, 3), (32 * MIB, 1)])
def test_spans_are_as_large_as_they_may_be(
    server: Server, archive: bytes, monkeypatch: pytest.MonkeyPatch, span: int, requests: int
) -> None:
    monkeypatch.setattr(remote, "SPAN", span)
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.requests.clear()
        assert opened["big"].tobytes() == BIG
        assert opened["w"].tobytes() == SMALL
    assert len(server.ranges()) == requests + 1


def test_rows_ask_for_their_chunks_only(server: Server, archive: bytes) -> None:
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.requests.clear()
        rows = opened.tensor("big")[3:4]
        assert rows.tobytes() == BIG[3 * 4 * MIB : 4 * 4 * MIB]
        assert len(server.requests) == 1
        assert sum(end - begin for begin, end in server.ranges()) <= 4 * MIB + 4096


def test_tensors_that_are_neighbours_are_one_request(server: Server, tmp_path: Path) -> None:
    contents = {f"layer.{i}": noise(700_000, i) for i in range(12)}
    server.files["m.tzip"] = packed(tmp_path, [(name, "U8", [700_000], raw) for name, raw in contents.items()])
    with tzip.open(server.url("m.tzip")) as opened:
        server.requests.clear()
        room = {row: np.empty(700_000, np.uint8) for row in range(12)}
        opened.read_into([(row, 0, out) for row, out in room.items()], 2)
        assert [out.tobytes() for out in room.values()] == list(contents.values())
        assert len(server.requests) == 1


def test_pieces_far_apart_are_requests_of_their_own(server: Server, tmp_path: Path) -> None:
    contents = {f"layer.{i}": noise(700_000, i) for i in range(3)}
    server.files["m.tzip"] = packed(tmp_path, [(name, "U8", [700_000], raw) for name, raw in contents.items()])
    with tzip.open(server.url("m.tzip")) as opened:
        server.requests.clear()
        room = {row: np.empty(700_000, np.uint8) for row in (0, 2)}
        opened.read_into([(row, 0, out) for row, out in room.items()], 2)
        assert [out.tobytes() for out in room.values()] == [contents["layer.0"], contents["layer.2"]]
        assert len(server.requests) == 2
        assert sum(end - begin for begin, end in server.ranges()) <= 1_400_000 + 2 * 4096


def test_many_threads_read_the_right_bytes(server: Server, archive: bytes) -> None:
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened, ThreadPoolExecutor(8) as pool:

        def read(i: int) -> bool:
            if i % 3 == 0:
                return opened["w"].tobytes() == SMALL
            if i % 3 == 1:
                return opened["big"].tobytes() == BIG
            row = i % 5
            return opened.tensor("big")[row].tobytes() == BIG[row * 4 * MIB : (row + 1) * 4 * MIB]

        assert all(pool.map(read, range(16)))


# ---------------------------------------------------------------- the verbs


def test_unpacking_and_verifying_from_afar(server: Server, archive: bytes, model: bytes, tmp_path: Path) -> None:
    server.files["m.tzip"] = archive
    url = server.url("m.tzip")
    assert tzip.verify(url, deep=True).chunks == 6
    tzip.unpack(url, tmp_path / "out")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == model


@pytest.mark.parametrize("verb", [["ls"], ["info"], ["verify"], ["verify", "--deep"]], ids=" ".join)
def test_the_command_takes_urls(server: Server, archive: bytes, tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "m.tzip").write_bytes(archive)
    server.files["m.tzip"] = archive
    near = CliRunner().invoke(cli, [*verb, str(tmp_path / "m.tzip")], prog_name="tzip")
    far = CliRunner().invoke(cli, [*verb, server.url("m.tzip")], prog_name="tzip")
    assert (far.exit_code, far.stderr) == (near.exit_code, near.stderr) == (0, "")
    assert far.stdout == near.stdout.replace(str(tmp_path / "m.tzip"), server.url("m.tzip"))


# ---------------------------------------------------------------- servers that misbehave

FAULTS = ["error", "refused", "cut", "too few", "elsewhere", "damaged", "no ranges"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_when_opening_is_an_error(server: Server, archive: bytes, fault: str) -> None:
    server.files["m.tzip"] = archive
    server.fault = fault
    with pytest.raises((OSError, TzipError)):
        tzip.open(server.url("m.tzip"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["big", "w"])
def test_a_bad_answer_when_reading_is_an_error(server: Server, archive: bytes, fault: str, name: str) -> None:
    """And when the server has recovered, so has the archive that is open."""
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.fault = fault
        with pytest.raises((OSError, TzipError)):
            opened[name]
        server.fault = ""
        if fault not in ("elsewhere", "damaged"):
            assert opened[name].tobytes() == {"big": BIG, "w": SMALL}[name]


@pytest.mark.parametrize("fault", ["elsewhere", "damaged"])
def test_wrong_bytes_of_the_right_length_are_not_kept(server: Server, archive: bytes, fault: str) -> None:
    """What failed its sums is asked for anew."""
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.fault = fault
        with pytest.raises(TzipError):
            opened["w"]
        server.fault = ""
        assert opened["w"].tobytes() == SMALL


def test_what_is_read_again_is_fetched_again(server: Server) -> None:
    """Its bytes may have been wrong; and a span is given up when its last piece was read."""
    server.files["f"] = BIG[:100_000]
    with remote.RemoteSource(server.url("f")) as source:
        source.expect([(0, 1000), (1000, 1000)])
        server.requests.clear()
        for offset in (0, 1000, 0, 1000):
            assert source.read_at(offset, 1000) == BIG[offset : offset + 1000]
        assert server.ranges() == [(0, 2000), (0, 1000), (1000, 2000)]


@pytest.mark.parametrize("fault", ["no ranges", "sizeless", "cut", "error"])
def test_the_command_says_what_is_wrong_with_a_server(server: Server, archive: bytes, fault: str) -> None:
    server.files["m.tzip"] = archive
    server.fault = fault
    done = CliRunner().invoke(cli, ["info", server.url("m.tzip")], prog_name="tzip")
    assert done.exit_code in (2, 3, 4, 6), (done.output, done.exception)
    assert done.stderr.startswith("tzip: ")
    assert server.url("m.tzip") in done.stderr


def test_a_server_that_does_not_say_the_size(server: Server, archive: bytes) -> None:
    server.files["m.tzip"] = archive
    server.fault = "sizeless"
    with pytest.raises(UsageError, match="how large"):
        tzip.open(server.url("m.tzip"))


def test_a_file_that_is_replaced_while_it_is_open(server: Server, archive: bytes, tmp_path: Path) -> None:
    other = safetensors_bytes([("big", "F32", [5, MIB], BIG[::-1]), ("w", "BF16", [300, 10], SMALL[::-1])], {"format": "pt"})
    (tmp_path / "m.safetensors").write_bytes(other)
    tzip.pack(tmp_path / "m.safetensors", tmp_path / "m.tzip", level="fast")
    server.files["m.tzip"] = archive
    with tzip.open(server.url("m.tzip")) as opened:
        server.files["m.tzip"] = (tmp_path / "m.tzip").read_bytes()
        for name in ("big", "w"):
            with pytest.raises((TzipError, OSError)):
                opened[name]


def test_what_is_not_there(server: Server) -> None:
    with pytest.raises(FileNotFoundError):
        tzip.open(server.url("none.tzip"))
    port = server.server_port
    server.server_close()
    with pytest.raises(OSError):
        tzip.open(f"http://127.0.0.1:{port}/m.tzip")


def test_what_is_no_archive(server: Server) -> None:
    server.files["x"] = b"hello" * 100
    server.files["none"] = b""
    for name in ("x", "none"):
        with pytest.raises(TzipError) as caught:
            tzip.open(server.url(name))
        assert caught.value.path == server.url(name)


def test_a_file_packed_in_place_far_away(server: Server, model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes([("w", "BF16", [500, 100], weights(50_000))]))
    assert list(tzip.pack_in_place([path]).changed) == [str(path)]
    server.files["m.safetensors"] = path.read_bytes()
    with tzip.open(server.url("m.safetensors")) as opened:
        assert opened["w"].tobytes() == weights(50_000)


# ---------------------------------------------------------------- other protocols


def test_the_loader_takes_urls(server: Server, archive: bytes, model: bytes) -> None:
    from safetensors import SafetensorError

    from tzip.safetensors import deserialize, safe_open
    from tzip.safetensors.numpy import load_file

    server.files["m.tzip"] = archive
    server.files["plain.safetensors"] = model
    expected = {name: bytes(entry["data"]) for name, entry in deserialize(model)}
    with safe_open(server.url("m.tzip"), "np") as opened:
        assert opened.keys() == sorted(expected)
        row = opened.get_slice("big")[1:2]
    assert row.tobytes() == expected["big"][row.nbytes : 2 * row.nbytes]
    read = sum(end - begin for begin, end in server.ranges())
    assert read < len(archive) // 2
    loaded = load_file(server.url("m.tzip"))
    assert {name: array.tobytes() for name, array in loaded.items()} == expected
    with pytest.raises(SafetensorError):
        safe_open(server.url("plain.safetensors"), "np")
    with pytest.raises(OSError, match="nothing"):
        safe_open(server.url("nothing"), "np")


def test_memory(archive: bytes) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe_file("/far/m.tzip", archive)
    try:
        with tzip.open("memory://far/m.tzip") as opened:
            assert opened["big"].tobytes() == BIG
            assert opened.tensor("w")[7:9].tobytes() == SMALL[140:180]
        with pytest.raises(FileNotFoundError):
            tzip.open("memory://far/none.tzip")
    finally:
        files.rm("/far", recursive=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s3(archive: bytes, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and the address of the store come from the environment, as for every tool."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        files = s3fs.S3FileSystem()
        files.mkdir("weights")
        files.pipe_file("weights/models/m.tzip", archive)
        with tzip.open("s3://weights/models/m.tzip") as opened:
            assert opened["big"].tobytes() == BIG
            assert opened.tensor("w")[7:9].tobytes() == SMALL[140:180]
        tzip.unpack("s3://weights/models/m.tzip", tmp_path)
        assert (tmp_path / "m.safetensors").read_bytes() == model
        with pytest.raises(FileNotFoundError):
            tzip.open("s3://weights/models/none.tzip")
    finally:
        store.stop()


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match=re.escape("tensor-tzip[remote]")):
        tzip.open("http://127.0.0.1:9/m.tzip")
    done = CliRunner().invoke(cli, ["info", "http://127.0.0.1:9/m.tzip"], prog_name="tzip")
    assert done.exit_code == 2
    assert "tensor-tzip[remote]" in done.stderr


def test_without_the_package_of_a_protocol_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match="s3fs"):
        tzip.open("s3://weights/m.tzip")


def test_no_protocol_at_all() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(UsageError, match="nothing://m"):
        tzip.open("nothing://m")
