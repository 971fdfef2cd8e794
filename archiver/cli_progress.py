"""What the commands print alike: progress, sizes, shares."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

_PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


class Progress:
    """Bytes, rate and time left: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, label: str, total: int | None, quiet: bool) -> None:
        self.label = label
        self.total = total
        self.quiet = quiet
        self.done = 0
        self.start = self.told = time.monotonic()
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False, file=sys.stderr)

    def __call__(self, n: int) -> None:
        """Add n bytes."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif not self.quiet and time.monotonic() - self.told > _PLAIN_SECONDS:
            self.told = time.monotonic()
            rate = self.done / (self.told - self.start)
            part = f" of {size(self.total)} ({100 * self.done // max(self.total, 1)} %)" if self.total else ""
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            click.echo(f"{self.label}: {size(self.done)}{part}, {size(int(rate))}/s{left}", err=True)

    def reached(self, done: int, total: int) -> None:
        """Say how many bytes are done, and of how many."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total
        self(done - self.done)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def progress(label: str, total: int | None, quiet: bool) -> Iterator[Progress]:
    """Show progress while the block runs."""
    shown = Progress(label, total, quiet)
    try:
        yield shown
    finally:
        shown.close()


def size(n: int | None) -> str:
    """Return a number of bytes in words."""
    if n is None:
        return "?"
    value, unit = float(n), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{n} B" if unit == "B" else f"{value:.2f} {unit}"


def percent(part: int, whole: int) -> str:
    """Return a share in words."""
    return f"{100 * part / whole:.2f} %" if whole else "-"
