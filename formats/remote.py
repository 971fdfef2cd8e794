"""Archives far away: http(s)://, s3://, hf:// and whatever else fsspec reads, by ranged requests."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tzip.coders.errors import UsageError
from tzip.formats.source import Source

SPAN = 16 << 20  # bytes of a request at most
GAP = 1 << 18  # bytes between two pieces that are read in vain rather than asked for apart
_HELD = 4  # spans that are kept until their pieces were read


class RemoteSource(Source):
    """A file behind a URL. What is expected is fetched in spans of neighbouring pieces, each once."""

    def __init__(self, url: str, **options: Any) -> None:
        try:
            import fsspec
        except ModuleNotFoundError:
            raise UsageError("reading a URL needs fsspec: pip install 'tensor-tzip[remote]'") from None
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as e:  # the protocol's own package is missing, or it is no protocol
            raise UsageError(f"cannot read {url}: {e}") from None
        size = self._fs.info(self._path)["size"]
        if size is None:
            raise UsageError("the server does not say how large the file is, so it cannot be read in parts").at(path=url)
        super().__init__(url, int(size))
        self._lock = threading.Lock()
        self._spans: list[tuple[int, int]] = []
        self._fetched: OrderedDict[tuple[int, int], _Span] = OrderedDict()

    def read_at(self, offset: int, n: int) -> bytes:
        end = min(offset + n, self.size)
        if offset >= end:
            return b""
        span = self._span_of(offset, end)
        if span is None:
            return self._fetch(offset, end)
        data = span.data(self)
        return data[offset - span.begin : end - span.begin]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        spans: list[tuple[int, int]] = []
        for offset, length in ranges:
            end = min(offset + length, self.size)
            if spans and offset - spans[-1][1] <= GAP and end - spans[-1][0] <= SPAN:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            else:
                spans.append((offset, end))
        with self._lock:
            self._spans = spans

    def _span_of(self, begin: int, end: int) -> "_Span | None":
        """Return the expected span that holds these bytes; the longest unread of too many is given up."""
        with self._lock:
            place = next((s for s in self._spans if s[0] <= begin and end <= s[1]), None)
            if place is None:
                return None
            span = self._fetched.setdefault(place, _Span(*place))
            self._fetched.move_to_end(place)
            while len(self._fetched) > _HELD:
                self._fetched.popitem(last=False)
            return span

    def _fetch(self, begin: int, end: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path, start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"{self.name}: asked for bytes {begin} to {end}, got {len(data)} of {end - begin}")
        return data

    def close(self) -> None:
        with self._lock:
            self._fetched.clear()
            self._spans = []


class _Span:
    """Bytes begin … end - 1, fetched by the first who asks; the others wait."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end
        self._lock = threading.Lock()
        self._data: bytes | None = None

    def data(self, source: RemoteSource) -> bytes:
        """Return the bytes."""
        with self._lock:
            if self._data is None:
                self._data = source._fetch(self.begin, self.end)
            return self._data
