"""The plot of size against decoding speed, a panel for each file and element type. Left and up is better."""

from pathlib import Path
from typing import Any

_WIDTH = 1.6  # points of size that a panel shows; larger ones stand at its edge
_COLOURS = {"tzip": "#c1272d", "zipnn": "#0b6fa4", "openzl": "#2e8540", "zstd": "#6b6b6b", "z4ai": "#b8860b"}
_MARKERS = {"tzip": "o", "zipnn": "s", "openzl": "^", "zstd": "D", "z4ai": "v"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of a results file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy
    from matplotlib import pyplot
    from PIL import Image  # matplotlib requires it

    panels = list(dict.fromkeys((r["file"], r["dtype"]) for r in rows))
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(6.2 * wide, 4.0 * high), dpi=90, squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel, key in zip(axes.flat, panels, strict=False):
        points = [r for r in rows if (r["file"], r["dtype"]) == key and r["percent"] and "proved" not in r["option"]]
        edge = min((float(r["percent"]) for r in points), default=0) + _WIDTH
        for r in points:
            r["x"], r["y"] = min(float(r["percent"]), edge), float(r["decode_best"])
            into = "+out" in r["option"]
            face = "none" if into else _COLOURS[r["tool"]]
            panel.scatter(
                r["x"], r["y"], s=54, facecolors=face, edgecolors=_COLOURS[r["tool"]], marker=_MARKERS[r["tool"]], zorder=3
            )
        _label(panel, points)
        panel.set_title(f"{key[0].removesuffix('.safetensors')} ({key[1]})", fontsize=10)
        panel.set_xlabel("size, % of the original (smaller is better)", fontsize=9)
        panel.set_ylabel("decode, GB/s (best)", fontsize=9)
        panel.margins(x=0.24)
        panel.set_ylim(0, 1.22 * max((r["y"] for r in points), default=1))
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.canvas.draw()
    # A palette makes the file a third as large.
    image = Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())[..., :3])
    image.quantize(64).save(path, optimize=True)


def _label(panel: Any, points: list[dict[str, Any]]) -> None:
    """Put names beside the markers, moved up where they would overlap; what is too large to be drawn says its size."""
    high = max((r["y"] for r in points), default=1)
    span = max((r["x"] for r in points), default=1) - min((r["x"] for r in points), default=0) or 1
    taken: list[tuple[float, float]] = []
    for r in sorted(points, key=lambda r: r["y"]):
        x, y = r["x"], r["y"]
        at = y
        while any(abs(x - tx) < 0.34 * span and abs(at - ty) < 0.06 * high for tx, ty in taken):
            at += 0.01 * high
        taken.append((x, at))
        far = f" ({float(r['percent']):.0f} %) →" if float(r["percent"]) > x else ""
        panel.annotate(
            " ".join(p for p in (r["tool"], r["option"]) if p) + far, (x, y), (x + 0.025 * span, at),
            fontsize=7.5, va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999"},
        )  # fmt: skip
