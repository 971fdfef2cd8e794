"""The error kinds of tzip: few, each with a stable exit code, each saying what, where, expected and found.

Operating system errors stay `OSError` (exit code 6). Exit codes are never reused; 1 is left to crashes.
"""

from typing import ClassVar, Self


class TzipError(Exception):
    """Base of all errors that tzip raises itself."""

    exit_code: ClassVar[int] = 9

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.path: str | None = None
        self.offset: int | None = None
        self.member: str | None = None
        self.tensor: str | None = None

    def at(
        self,
        *,
        path: str | None = None,
        offset: int | None = None,
        member: str | None = None,
        tensor: str | None = None,
    ) -> Self:
        """Add where it happened; a place that is already known stays."""
        self.path = path if self.path is None else self.path
        self.offset = offset if self.offset is None else self.offset
        self.member = member if self.member is None else self.member
        self.tensor = tensor if self.tensor is None else self.tensor
        return self

    def __str__(self) -> str:
        places = [
            f"{label} {value!r}" if isinstance(value, str) else f"{label} {value}"
            for label, value in (
                ("file", self.path),
                ("offset", self.offset),
                ("member", self.member),
                ("tensor", self.tensor),
            )
            if value is not None
        ]
        return f"{self.message} ({', '.join(places)})" if places else self.message


class UsageError(TzipError):
    """The call or the input cannot be served as asked: the caller must change it."""

    exit_code = 2


class CorruptError(TzipError):
    """The bytes contradict the format or their own sums."""

    exit_code = 3


class TruncatedError(CorruptError):
    """The bytes end too early."""

    exit_code = 4


class UnsupportedError(TzipError):
    """Made by a newer writer: a version, flag, codec or id that this reader does not know."""

    exit_code = 5


class NotAnArchiveError(TzipError):
    """The file does not start like a tzip archive."""

    exit_code = 7


class ChangedError(TzipError):
    """The input changed while it was read."""

    exit_code = 8


class BaseNotFoundError(TzipError):
    """The tensor is a difference from one in another file, which is not here, or is another file than it was."""

    exit_code = 10


class ConflictError(TzipError):
    """Another process has written to the same run of checkpoints meanwhile."""

    exit_code = 11


class TensorNotFoundError(UsageError, KeyError):
    """No member or tensor has that name."""

    __str__ = TzipError.__str__
