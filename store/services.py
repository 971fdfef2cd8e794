"""What object stores can do beyond fsspec's interface: writing a file only where none, or the one that was seen, stands, and
finding uploads that nobody has ended.

fsspec's own `mode="create"` compares nothing, and for an empty file some of its file systems ignore it.
"""

import contextlib
import datetime
import threading
from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import quote

from tzip.coders.errors import UsageError

_PART = 16 << 20  # bytes of a part of an upload; eight are in memory at once
_PARTS = 8
_MOST_PARTS = 9000  # S3 takes 10,000


class Service(ABC):
    """A file system whose writes can be made to depend on what stands there. Paths are fsspec's."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    @abstractmethod
    def read(self, path: str) -> tuple[bytes, Any] | None:
        """Return a small file, and what `write` needs to replace just that one; None when there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes, seen: Any = None) -> bool:
        """Write a small file where that stands which `read` has seen, or nothing (None); False when there is another."""

    @abstractmethod
    def wrong(self) -> Any:
        """Return what `read` says of no file that there can be."""

    def upload_options(self, size: int) -> dict[str, Any]:
        """Return what `put_file` takes for a file of that size."""
        return {}

    def abort_uploads(self, prefix: str, older: float) -> int:
        """End uploads to paths that begin so and that were begun more than `older` seconds ago; return how many."""
        return 0


def service_of(fs: Any, url: str) -> Service:
    """Return what writes to a file system on conditions. Raises UsageError for one that cannot."""
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if "s3" in names and hasattr(fs, "call_s3"):
        return _S3(fs)
    if "gs" in names and hasattr(fs, "call") and hasattr(fs, "url"):
        return _Gcs(fs)
    if "memory" in names:
        return _Memory(fs)
    raise UsageError(
        f"{url.partition('://')[0]}:// has no writes that depend on what stands there, so that two writers would overwrite "
        "each other's checkpoints; a store can be at s3://, gs:// or memory://, or in a folder"
    ).at(path=url)


class _S3(Service):
    """S3 and what speaks its language: If-None-Match and If-Match with entity tags."""

    def read(self, path: str) -> tuple[bytes, Any] | None:
        from fsspec.asyn import sync

        async def get() -> tuple[bytes, Any]:
            answer = await self.fs._call_s3("get_object", **self._place(path))
            try:
                return await answer["Body"].read(), answer["ETag"]
            finally:
                answer["Body"].close()

        try:
            found: tuple[bytes, Any] = sync(self.fs.loop, get)
        except FileNotFoundError:
            return None
        return found

    def write(self, path: str, data: bytes, seen: Any = None) -> bool:
        condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
        try:
            self.fs.call_s3("put_object", **self._place(path), Body=data, **condition)
        except OSError as e:
            # 404: what was seen has been removed.
            if isinstance(e, FileExistsError) or _status(e) == 412 or (seen is not None and _status(e) == 404):
                return False
            raise
        return True

    def wrong(self) -> Any:
        return '"00000000000000000000000000000000"'

    def upload_options(self, size: int) -> dict[str, Any]:
        return {"chunksize": max(_PART, -(-size // _MOST_PARTS)), "max_concurrency": _PARTS}

    def abort_uploads(self, prefix: str, older: float) -> int:
        place = self._place(prefix)
        asked: dict[str, Any] = {"Bucket": place["Bucket"], "Prefix": place["Key"]}
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older)
        aborted = 0
        while True:
            answer = self.fs.call_s3("list_multipart_uploads", **asked)
            for upload in answer.get("Uploads", ()):
                if upload["Initiated"] <= before:
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.call_s3(
                            "abort_multipart_upload", Bucket=asked["Bucket"], Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                    aborted += 1
            if not answer.get("IsTruncated"):
                return aborted
            asked |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def _place(self, path: str) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(path)
        return {"Bucket": bucket, "Key": key}


def _status(e: OSError) -> int:
    """Return the HTTP status of an answer that became an error, 0 when it was none."""
    answer = getattr(e.__cause__, "response", None) or {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class _Gcs(Service):
    """Google's: conditions on the generation of what stands there. Uploads that nobody ends it forgets by itself."""

    def read(self, path: str) -> tuple[bytes, Any] | None:
        try:
            headers, data = self.fs.call("GET", self.fs.url(path))
        except FileNotFoundError:
            return None
        return bytes(data), next(v for k, v in headers.items() if k.lower() == "x-goog-generation")

    def write(self, path: str, data: bytes, seen: Any = None) -> bool:
        bucket, key, _ = self.fs.split_path(path)
        root = self.fs.url(path).partition("/download/storage/")[0]
        try:
            self.fs.call(
                "POST", f"{root}/upload/storage/v1/b/{quote(bucket, safe='')}/o", uploadType="media", name=key,
                ifGenerationMatch="0" if seen is None else seen, data=data,
                headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
        except FileExistsError:
            return False
        except FileNotFoundError:  # what was seen has been removed, unless it is the bucket
            if seen is None:
                raise
            return False
        return True

    def wrong(self) -> Any:
        return "1"


_memory = threading.Lock()


class _Memory(Service):
    """fsspec's memory, which only this process has."""

    def read(self, path: str) -> tuple[bytes, Any] | None:
        try:
            data: bytes = self.fs.cat_file(path)
        except FileNotFoundError:
            return None
        return data, data

    def write(self, path: str, data: bytes, seen: Any = None) -> bool:
        with _memory:
            if (self.read(path) or (None,))[0] != seen:
                return False
            self.fs.pipe_file(path, data)
        return True

    def wrong(self) -> Any:
        return b"what nobody has written"
