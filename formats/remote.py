"""Archives far away: http(s)://, s3://, hf:// and whatever else fsspec reads, by ranged requests."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from tzip.coders.errors import UsageError
from tzip.formats.source import Source

SPAN = 16 << 20  # bytes of a request at most
GAP = 1 << 18  # bytes between two pieces that are read in vain rather than asked for apart
_HELD = 4  # spans that are kept until their pieces were read


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return the file system of a URL and the path there. Raises UsageError when the package for it is missing."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise UsageError("reading a URL needs fsspec: pip install 'tensor-tzip[remote]'") from None
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as e:  # the protocol's own package is missing, or it is no protocol
        raise UsageError(f"cannot read {url}: {e}") from None
    return found


class SpanSource(Source):
    """A file far away, of which `fetch(begin, end)` returns bytes. What is expected is fetched in spans of neighbouring pieces,
    each once.
    """

    far = True

    def __init__(self, name: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        super().__init__(name, size)
        self.fetch = fetch
        self._lock = threading.Lock()
        self._pieces: dict[int, _Span] = {}
        self._fetched: OrderedDict[int, _Span] = OrderedDict()

    def read_at(self, offset: int, n: int) -> bytes:
        end = min(offset + n, self.size)
        if offset >= end:
            return b""
        span = self._span_of(offset)
        if span is None or end > span.end:
            return self._fetch(offset, end)
        data = span.data(self._fetch)
        return data[offset - span.begin : end - span.begin]

    def expect(self, ranges: Sequence[tuple[int, int]], more: bool = False) -> None:
        spans: list[_Span] = []
        pieces: dict[int, _Span] = {}
        for offset, length in ranges:
            end = min(offset + length, self.size)
            if spans and offset - spans[-1].end <= GAP and end - spans[-1].begin <= SPAN:
                spans[-1].end = max(end, spans[-1].end)
            else:
                spans.append(_Span(offset, end))
            pieces[offset] = spans[-1]
            spans[-1].left += 1
        with self._lock:
            if more:
                self._pieces.update(pieces)
                return
            self._pieces = pieces
            self._fetched.clear()

    def _span_of(self, begin: int) -> "_Span | None":
        """Return the span of a piece that is expected; once, so that what is read again, perhaps for its bytes were wrong, is
        fetched again. Of too many spans with pieces left the longest unread is given up.
        """
        with self._lock:
            span = self._pieces.pop(begin, None)
            if span is None or span.given_up:
                return None
            span.left -= 1
            self._fetched[span.begin] = span
            self._fetched.move_to_end(span.begin)
            if not span.left:
                del self._fetched[span.begin]
            while len(self._fetched) > _HELD:
                self._fetched.popitem(last=False)[1].given_up = True
            return span

    def _fetch(self, begin: int, end: int) -> bytes:
        data = self.fetch(begin, end)
        if len(data) != end - begin:
            raise OSError(f"{self.name}: asked for bytes {begin} to {end}, got {len(data)} of {end - begin}")
        return data

    def close(self) -> None:
        with self._lock:
            self._fetched.clear()
            self._pieces = {}


class RemoteSource(SpanSource):
    """A file behind a URL."""

    def __init__(self, url: str, **options: Any) -> None:
        fs, path = file_system(url, **options)
        size = asked(url, lambda: fs.info(path)["size"])
        if size is None:
            raise UsageError("the server does not say how large the file is, so it cannot be read in parts").at(path=url)
        super().__init__(url, int(size), lambda begin, end: asked(url, lambda: fs.cat_file(path, start=begin, end=end)))


def asked(url: str, ask: Callable[[], Any]) -> Any:
    """Return what a file system answers. What it raises becomes OSError: those of HTTP libraries are of their own kinds."""
    try:
        return ask()
    except (OSError, MemoryError):
        raise
    except Exception as e:
        raise OSError(f"{url}: {type(e).__name__}: {e}") from e


class _Span:
    """Bytes begin … end - 1, fetched by the first who asks; the others wait. Who has read the last piece lets go of them."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end
        self.left = 0  # pieces that were not read yet
        self.given_up = False
        self._lock = threading.Lock()
        self._data: bytes | None = None

    def data(self, fetch: Callable[[int, int], bytes]) -> bytes:
        """Return the bytes."""
        with self._lock:
            if self._data is None:
                self._data = fetch(self.begin, self.end)
            return self._data
