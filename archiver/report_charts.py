"""The drawings of a report, as SVG that stands in a page: drawn by matplotlib, coloured by the page's CSS variables.

Each drawing is made for a width in pixels and scaled little, so that its text stays readable on a phone. matplotlib gets
colours that stand for roles; the roles' colours are the page's, which has others in dark mode.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tzip.coders.errors import UsageError

STEPS = 8  # of the scale
_ROLES = (
    "ink", "soft", "line", "paper", "kept", "saved", *(f"p{i}" for i in range(7)), *(f"s{i}" for i in range(STEPS)),
    *(f"i{i}" for i in range(STEPS)),
)  # fmt: skip
_HEX = {role: f"#0000{i + 1:02x}" for i, role in enumerate(_ROLES)}
_NAMES = {code: f"var(--{role})" for role, code in _HEX.items()}
_TEXT = 12.0  # pixels
_LETTER = 0.59  # of its height, the width of a letter of a sans-serif font, about: the reader's font is not known


@dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of a treemap: its label, its area, its step of the scale, and what it says when pointed at."""

    label: str
    area: float
    step: int
    tip: str


@dataclass(frozen=True, slots=True)
class Bar:
    """What was `before` and is `after`, in bytes, how both are written, and the change."""

    label: str
    before: float
    after: float
    text: str
    change: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """The share of each column, 0 … 1, and what stands at the end of the row."""

    label: str
    shares: Sequence[float]
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stacked bar: its role (p0 … p6), its size, its label."""

    role: str
    size: float
    label: str


def require() -> None:
    """Raise UsageError when matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("a report needs matplotlib: pip install 'tensor-tzip[report]'") from None


class _Canvas:
    """Axes whose units are pixels, from the top left."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")
        self.figure.patch.set_visible(False)
        self.tips: dict[str, str] = {}

    def box(self, x: float, y: float, width: float, height: float, role: str, tip: str = "") -> None:
        """Fill a rectangle."""
        from matplotlib.patches import Rectangle

        patch = Rectangle((x, y), max(width, 0), max(height, 0), facecolor=_HEX[role], linewidth=0, clip_on=False)
        if tip:
            name = f"tip{len(self.tips)}"
            self.tips[name] = tip
            patch.set_gid(name)
        self.axes.add_patch(patch)

    def boxes(self, places: Sequence[tuple[float, float, float, float]], role: str) -> None:
        """Fill many rectangles of one colour by one path, which keeps the page small."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in places]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(places)
        path = Path([p for c in corners for p in c], codes)
        self.axes.add_patch(PathPatch(path, facecolor=_HEX[role], linewidth=0, clip_on=False))

    def text(self, x: float, y: float, text: str, role: str = "ink", **style: Any) -> None:
        """Write one line whose middle is at y. Names are no formulas, whatever dollar signs they have."""
        usual: dict[str, Any] = {"fontsize": _TEXT, "va": "center_baseline", "parse_math": False, "clip_on": False}
        self.axes.text(x, y, text, color=_HEX[role], **(usual | style))

    def svg(self, key: str, title: str, description: str) -> str:
        """Return the drawing as an element of a page; `key` makes its ids different from other drawings'."""
        import matplotlib as mpl

        out = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tzip"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that matplotlib's font lacks: the reader's font draws them
            self.figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
        text = re.sub(r"#0000[0-9a-f]{2}\b", lambda m: _NAMES.get(m[0], m[0]), text)
        # The reader's font, in the two ways that matplotlib's versions write it; turned by nothing.
        text = re.sub(r"font: ((?:\w+ )*[\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
        text = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-?0 [^\"]*\"", "", text)
        text = re.sub(r'<g id="(tip\d+)">', lambda m: f'<g class="cell"><title>{html.escape(self.tips[m[1]])}</title>', text)
        text = re.sub(r' id="([^"]+)"', rf' id="{key}-\1"', text)
        text = re.sub(r'(url\(#|xlink:href="#)', lambda m: m[1].replace("xlink:", "") + key + "-", text)
        view = re.search(r'viewBox="[^"]*"', text)
        body = text[text.index(">") + 1 :]
        names = f'<title id="{key}-t">{html.escape(title)}</title><desc id="{key}-d">{html.escape(description)}</desc>'
        head = f'<svg class="chart" role="img" aria-labelledby="{key}-t {key}-d" {view[0] if view else ""}>{names}'
        return head + re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)).strip() + "\n"


def fit(text: str, pixels: float, size: float = _TEXT, head: float = 0.35) -> str:
    """Shorten a text so that it is at most about so wide; "" when there is no room for three letters. `head`: the share of
    what is kept that is its beginning.
    """
    room = int(pixels / (size * _LETTER))
    if len(text) <= room:
        return text
    if room < 4:
        return ""
    first = round((room - 1) * head)
    return f"{text[:first]}…{text[len(text) - (room - 1 - first) :]}"


def treemap(
    key: str, title: str, description: str, groups: Sequence[tuple[str, Sequence[Cell]]], width: float, height: float
) -> str:
    """Draw groups of cells, each as large as its area."""
    canvas = _Canvas(width, height)
    areas = [sum(cell.area for cell in cells) for _, cells in groups]
    for (name, cells), (x, y, w, h) in zip(groups, _squares(areas, 0, 0, width, height), strict=True):
        label = fit(name, (w - 8) * 0.86)  # bold
        head = 19.0 if label and w > 60 and h > 50 and len(cells) > 1 else 0.0
        if head:
            canvas.text(x + 3, y + 10, label, "soft", weight="bold", fontsize=11.5)
        inner = _squares([cell.area for cell in cells], x, y + head, max(w - 3, 0.5), max(h - head - 3, 0.5))
        for cell, (cx, cy, cw, ch) in zip(cells, inner, strict=True):
            canvas.box(cx, cy, max(cw - 1.2, 0.4), max(ch - 1.2, 0.4), f"s{cell.step}", cell.tip)
            lines = [fit(line, cw - 9, 11, 1.0) for line in cell.label.split("\n")]
            if cw < 44 or ch < 17 or not lines[0]:
                continue
            for i, line in enumerate(lines[: 2 if ch > 33 else 1]):
                canvas.text(cx + 5, cy + 10 + 14 * i, line, f"i{cell.step}", fontsize=11)
    return canvas.svg(key, title, description)


def _squares(areas: Sequence[float], x: float, y: float, width: float, height: float) -> Iterator[tuple[float, ...]]:
    """Yield a rectangle for each of these areas, which descend, as square as may be (Bruls, Huizing and van Wijk, 2000)."""
    total = sum(areas)
    scale = width * height / total if total else 0.0
    sizes = [a * scale for a in areas]
    at = 0
    while at < len(sizes):
        short = max(min(width, height), 1e-9)
        end, best = at + 1, _worst(sizes[at : at + 1], short)
        while end < len(sizes):
            ratio = _worst(sizes[at : end + 1], short)
            if ratio > best:
                break
            end, best = end + 1, ratio
        row = sizes[at:end]
        thick = sum(row) / short
        along = 0.0
        for size in row:
            length = size / thick if thick else 0.0
            yield (x, y + along, thick, length) if width >= height else (x + along, y, length, thick)
            along += length
        if width >= height:
            x, width = x + thick, max(width - thick, 0.0)
        else:
            y, height = y + thick, max(height - thick, 0.0)
        at = end


def _worst(row: Sequence[float], short: float) -> float:
    """Return how far from a square the worst rectangle of a row is."""
    total = sum(row)
    if not total or not min(row):
        return float("inf")
    return max(short * short * max(row) / (total * total), total * total / (short * short * min(row)))


def bars(key: str, title: str, description: str, rows: Sequence[Bar], width: float) -> str:
    """Draw a bar for each row: all of it was before, its dark part is after."""
    wide = width > 600
    step = 30.0 if wide else 42.0
    canvas = _Canvas(width, step * len(rows) + 4)
    left, right = (330.0, 220.0) if wide else (0.0, 0.0)
    scale = (width - left - right) / max((max(bar.before, bar.after) for bar in rows), default=1) if rows else 1.0
    for i, bar in enumerate(rows):
        y = i * step + (4 if wide else 20)
        middle = y + 9
        tip = f"{bar.label}\n{bar.text}, {bar.change}"
        canvas.box(left, y, bar.before * scale, 18, "saved", tip)
        canvas.box(left, y, max(bar.after * scale, 1.0), 18, "kept", tip)
        if wide:
            canvas.text(left - 12, middle, fit(bar.label, left - 14), ha="right")
            canvas.text(left + bar.before * scale + 10, middle, f"{bar.text}, {bar.change}", "soft")
            continue
        canvas.text(0, y - 9, fit(bar.label, width - 62, 11.5), fontsize=11.5)
        canvas.text(width, y - 9, bar.change, "soft", ha="right", fontsize=11)
        if len(bar.text) * 11 * _LETTER < bar.after * scale - 10:
            canvas.text(6, middle, bar.text, "paper", fontsize=11)
        elif len(bar.text) * 11 * _LETTER < width - bar.before * scale - 10:
            canvas.text(bar.before * scale + 8, middle, bar.text, "soft", fontsize=11)
    return canvas.svg(key, title, description)


def stacked(key: str, title: str, description: str, rows: Sequence[tuple[str, str, Sequence[Part]]], width: float) -> str:
    """Draw bars of parts: (label, what stands at its end, parts)."""
    wide = width > 600
    canvas = _Canvas(width, 62.0 * len(rows))
    whole = max((sum(p.size for p in parts) for _, _, parts in rows), default=0) or 1.0
    for i, (label, text, parts) in enumerate(rows):
        y = i * 62.0
        canvas.text(0, y + 9, label, weight="bold")
        canvas.text(width, y + 9, text, "soft", ha="right")
        x = 0.0
        for part in parts:
            w = part.size / whole * width
            canvas.box(x, y + 20, max(w - 1.5, 0.4), 32, part.role, part.label)
            inside = part.label if len(part.label) * 12 * _LETTER < w - 12 else part.label.rpartition(" ")[2]
            if wide and len(inside) * 12 * _LETTER < w - 12:
                canvas.text(x + 7, y + 36, inside, "paper", weight="bold", fontsize=11.5)
            x += w
    return canvas.svg(key, title, description)


def heat(
    key: str, title: str, description: str, rows: Sequence[HeatRow], ticks: Sequence[tuple[int, str]], width: float
) -> str:
    """Draw a row of cells for each row of shares, the darker the larger; ticks: (column, text)."""
    wide = width > 600
    step = 24.0 if wide else 38.0
    left, right, cell = (330.0, 96.0, 22.0) if wide else (0.0, 0.0, 18.0)
    columns = max((len(row.shares) for row in rows), default=0)
    canvas = _Canvas(width, step * len(rows) + 30)
    scale = (width - left - right) / max(columns, 1)
    cells: dict[int, list[tuple[float, float, float, float]]] = {}
    for i, row in enumerate(rows):
        y = i * step + (0 if wide else 18)
        if wide:
            canvas.text(left - 12, y + 11, fit(row.label, left - 14), ha="right")
            canvas.text(width - right + 10, y + 11, row.text, "soft")
        else:
            canvas.text(0, y - 9, fit(row.label, width - 8 - len(row.text) * 11 * _LETTER, 11.5), fontsize=11.5)
            canvas.text(width, y - 9, row.text, "soft", ha="right", fontsize=11)
        most = max(row.shares, default=0) or 1.0
        for k, share in enumerate(row.shares):
            # By the root: what is rare costs bits, too, and should be seen.
            dark = 0 if share <= 0 else 1 + min(STEPS - 2, int((share / most) ** 0.5 * (STEPS - 1)))
            cells.setdefault(dark, []).append((left + k * scale, y, scale - 0.8, cell))
    for dark in sorted(cells):
        canvas.boxes(cells[dark], f"s{dark}")
    bottom = step * len(rows) + 12
    for k, text in ticks:
        x = left + (k + 0.5) * scale
        place = "left" if k == 0 and not wide else "right" if k >= columns - 2 and not wide else "center"
        canvas.text(x, bottom, text, "soft", ha=place, fontsize=13)
    return canvas.svg(key, title, description)
