"""What a report tells, and in which words numbers and names are written."""

import html
import re
import unicodedata
from dataclasses import dataclass, field

_NAME = 160  # letters of a name
LIMITS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)  # shares saved where the next step of the scale begins
PARTS = {
    "p0": "exponents and top mantissa bits",
    "p1": "signs and other mantissa bits",
    "p2": "lower mantissa bits",
    "p3": "structured data",
    "p4": "differences from the base",
    "p5": "integers and other bytes",
    "p6": "repeats, headers, index",
}


@dataclass(slots=True)
class Exponents:
    """The shares of exponents in a sample of `elements`, of zeros with subnormal numbers, and of infinities with NaNs;
    their entropy in bits, and how many bits they have.
    """

    shares: dict[int, float]
    zero: float
    special: float
    entropy: float
    bits: int
    elements: int


@dataclass(slots=True)
class Tensor:
    """A row of the table. `own`: bytes of the file that are no other tensor's before; `after`: what they become."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int
    own: int
    after: float
    note: str = ""
    exponents: Exponents | None = None


@dataclass(slots=True)
class Structure:
    """How much of a kind was found, and what it became."""

    before: float = 0.0
    after: float = 0.0

    def add(self, before: float, after: float) -> None:
        """Add a chunk or run."""
        self.before += before
        self.after += after


@dataclass(slots=True)
class Figures:
    """What a page tells. Sizes in bytes; `alone`: without a base; `repeats`: of what is
    there already.

    `packed` figures are those of an archive, exact; others were estimated from `sampled` bytes, and `unseen` ones are
    taken to be like those.
    """

    name: str
    container: str
    size: int
    packed: bool = False
    after: float = 0.0
    alone: float = 0.0
    sampled: int = 0
    unseen: int = 0
    looked: int = 0
    based: int = 0
    repeats: int = 0
    bases: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    structures: dict[str, Structure] = field(default_factory=dict)
    codecs: dict[str, float] = field(default_factory=dict)
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)


# ---- words


def clean(name: str) -> str:
    """Return a name as it can be shown: on one line, no longer than some, without signs that are invisible or turn text."""
    if not name:
        return "(no name)"
    short = name if len(name) <= _NAME else f"{name[: _NAME // 3]}…{name[-(_NAME - _NAME // 3 - 1) :]}"
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in short)


def escaped(name: str) -> str:
    """Return a name as a page may hold it."""
    return html.escape(clean(name))


def breakable(name: str) -> str:
    """Return a name as a page may hold it, where lines may break between its words."""
    return re.sub(r"([./_])(?=.)", r"\1<wbr>", escaped(name))


def size_text(n: float) -> str:
    """Return a number of bytes with three or four digits and a unit."""
    value = float(n)
    if value < 1000:
        return f"{round(value)}\u00a0B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.5 or unit == "PB":
            break
    return f"{value:.{2 if value < 100 else 0}f}\u00a0{unit}"


def saved_share(before: float, after: float) -> float:
    """Return the share that was saved."""
    return 1 - after / before if before else 0.0


def change_text(before: float, after: float) -> str:
    """Return the change in percent, signed."""
    if not before:
        return "–"
    percent = 100 * (after - before) / before
    sign = "±" if abs(percent) < 0.05 else "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.1f}\u00a0%"


def step_of(before: float, after: float) -> int:
    """Return the step of the scale for what was saved."""
    saved = saved_share(before, after)
    return sum(saved >= limit for limit in LIMITS)


def plural(n: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def count_text(n: float) -> str:
    """Return a large number in words."""
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= limit:
            return f"{n / limit:.{2 if n < 100 * limit else 0}f} {word}"
    return f"{round(n):,}"


def layer_of(name: str) -> str:
    """Return the block of layers that a tensor is in: its name up to the first number, or its first word."""
    words = re.split(r"([./])", name)
    for i in range(0, len(words), 2):
        if words[i].isdigit():
            return "".join(words[: i + 1])
    return words[0] if len(words) > 1 else "others"


def kind_of(name: str) -> str:
    """Return a name with * for numbers: the same part of each layer."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)


def power_text(n: int) -> str:
    """Return two to this power."""
    return "2" + str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def circa(f: Figures) -> str:
    """Return the sign of estimates, nothing for exact figures."""
    return "" if f.packed else "≈\u00a0"


def short_name(name: str, block: str) -> str:
    """Return what a name says within its block of layers."""
    return name.removeprefix(block).lstrip("./").removesuffix(".weight") or name


def share_text(part: float) -> str:
    """Return a share in percent."""
    return "under 0.1 %" if 0 < part < 0.001 else "over 99.9 %" if 0.999 < part < 1 else f"{100 * part:.1f} %"
