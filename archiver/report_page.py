"""The page of a report: its drawings, its tables, its words. It asks for nothing from anywhere."""

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tzip.report_charts import Bar, Cell, HeatRow, Part, bars, heat, stacked, treemap
from tzip.report_figures import (
    LIMITS,
    PARTS,
    Exponents,
    Figures,
    Tensor,
    breakable,
    change_text,
    circa,
    clean,
    count_text,
    escaped,
    kind_of,
    layer_of,
    plural,
    power_text,
    saved_share,
    share_text,
    short_name,
    size_text,
    step_of,
)
from tzip.report_style import SCRIPT, STYLE
from tzip.version import __version__

_WIDE, _NARROW = 1040.0, 350.0  # pixels that drawings are made for
_ROWS = 500  # of the table; more make the page large and nobody reads them
_CELLS = {_WIDE: 260, _NARROW: 70}
_KINDS = {_WIDE: 16, _NARROW: 12}
_COLUMNS = 44  # exponents that are drawn at most
_STRUCTURES = {
    "none": "floats cut into exponents and the rest, bytes as they are",
    "palette": "few different values",
    "grid": "small integers times a scale, as quantised weights are",
    "sparse": "mostly one value",
    "difference": "sequences",
    "offset": "integers in a short range",
    "rows": "rows of similar scale put together",
    "delta": "differences from the base",
    "records": "blocks of quantised weights, each with its scale",
    "vocabulary": "token ids: integers of which few are frequent",
}


# ---- drawings


def _both(key: str, draw: Callable[[str, float], str], caption: str, legend: str = "") -> str:
    """Return a figure drawn for wide and for narrow windows, of which the page shows one."""
    wide, narrow = draw(f"{key}-w", _WIDE), draw(f"{key}-n", _NARROW)
    return (
        f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>{legend}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _map(f: Figures) -> str:
    """Draw where the bytes are: an area for each tensor, the smallest of each block of layers together."""
    rows = [t for t in f.tensors if t.own]
    if not rows:
        return ""
    sign = circa(f)

    def draw(key: str, width: float) -> str:
        shown = set(map(id, sorted(rows, key=lambda t: -t.own)[: _CELLS[width]]))
        blocks: dict[str, list[Tensor]] = {}
        for t in rows:
            blocks.setdefault(layer_of(t.name), []).append(t)
        groups: list[tuple[str, list[Cell]]] = []
        lost: list[Tensor] = []
        for block, tensors in blocks.items():
            large = [t for t in tensors if id(t) in shown]
            small = [t for t in tensors if id(t) not in shown]
            if not large:
                lost += small
                continue
            alone = len(tensors) == 1
            cells = [_cell(t.name, short_name(t.name, "" if alone else block), [t], sign) for t in large]
            if small:
                cells.append(_cell(f"{plural(len(small), 'smaller tensor')} of {block}", f"{len(small):,} more", small, sign))
            groups.append((clean(block), sorted(cells, key=lambda c: -c.area)))
        if lost:
            name = f"{plural(len(lost), 'smaller tensor')}"
            groups.append((name, [_cell(name, name, lost, sign)]))
        if f.size - sum(t.own for t in f.tensors) > f.size / 200:
            n = f.size - sum(t.own for t in f.tensors)
            groups.append(("no tensor", [Cell(f"no tensor\n{size_text(n)}", n, 0, f"bytes of no tensor\n{size_text(n)}")]))
        groups.sort(key=lambda g: -sum(c.area for c in g[1]))
        height = 520.0 if width > 600 else 560.0
        most = max(rows, key=lambda t: t.own)
        description = (
            f"A treemap of {plural(len(rows), 'tensor')} in {plural(len(blocks), 'block')}. The largest tensor is "
            f"{clean(most.name)} with {size_text(most.own)}. The table below has all figures."
        )
        return treemap(key, "Where the bytes are", description, groups, width, height)

    names = ["under 1 %", *(f"{round(100 * low)} % or more" for low in LIMITS)]
    used = sorted({step_of(t.own, t.after) for t in rows})
    chips = "".join(f'<li><i class="chip s{k}"></i>{names[k]}</li>' for k in used)
    word = "saved by tzip" if f.packed else "tzip would save"
    caption = (
        "Each rectangle is a tensor, as large as its bytes in the original file, grouped by block of layers. "
        "Point at one for its name; press it to find it in the table."
    )
    return _section(
        "map", "Where the bytes are", _both("m", draw, caption, f'<ul class="legend"><li>{word}:</li>{chips}</ul>')
    )


def _cell(name: str, label: str, tensors: Sequence[Tensor], sign: str) -> Cell:
    own, after = sum(t.own for t in tensors), sum(t.after for t in tensors)
    step = step_of(own, after)
    change = f"{sign}{size_text(after)}, {change_text(own, after)}"
    return Cell(f"{clean(label)}\n{size_text(own)}", own, step, f"{clean(name)}\n{size_text(own)} → {change}")


def _kinds(f: Figures) -> str:
    """Draw what is gained, by kind of tensor."""
    kinds: dict[str, list[Tensor]] = {}
    for t in f.tensors:
        kinds.setdefault(kind_of(t.name), []).append(t)
    order = _by_size(kinds)
    if not order:
        return ""
    sign = circa(f)

    def draw(key: str, width: float) -> str:
        rows = [_bar(_times(name, len(ts)), ts, sign) for name, ts in order[: _KINDS[width]]]
        rest = [t for _, ts in order[_KINDS[width] :] for t in ts]
        if rest:
            rows.append(_bar(f"{plural(len(rest), 'tensor')} of {plural(len(order) - len(rows), 'other kind')}", rest, sign))
        words = "; ".join(f"{row.label}: {row.text}, {row.change}" for row in rows)
        return bars(key, "Bytes by kind of tensor", words, rows, width)

    legend = (
        '<ul class="legend"><li><i class="chip saved"></i>before</li><li><i class="chip kept"></i>'
        f"{'in the archive' if f.packed else 'with tzip (estimated)'}</li></ul>"
    )
    caption = (
        "Tensors whose names differ in numbers only are one kind. A full bar is the original size, its strong part "
        "what is left."
    )
    return _section("kinds", "What is gained, and where", _both("k", draw, caption, legend))


def _by_size(kinds: dict[str, list[Tensor]]) -> list[tuple[str, list[Tensor]]]:
    """Return the kinds that have bytes, those with most of them first."""
    sizes = {name: sum(t.own for t in tensors) for name, tensors in kinds.items()}
    return sorted(((name, ts) for name, ts in kinds.items() if sizes[name]), key=lambda kind: -sizes[kind[0]])


def _times(name: str, n: int) -> str:
    return f"{clean(name)} × {n:,}" if n > 1 else clean(name)


def _bar(label: str, tensors: Sequence[Tensor], sign: str) -> Bar:
    own, after = sum(t.own for t in tensors), sum(t.after for t in tensors)
    return Bar(label, own, after, f"{size_text(own)} → {sign}{size_text(after)}", change_text(own, after))


def _anatomy(f: Figures) -> str:
    """Draw what the bytes consist of, before and after."""
    sums = [sum(pair[i] for pair in f.parts.values()) for i in range(2)]
    parts = f.parts | {"p6": (max(f.size - sums[0], 0), max(f.after - sums[1], 0))}
    parts = {role: pair for role, pair in sorted(parts.items()) if max(pair) >= 0.5}
    if not f.parts:
        return ""

    def draw(key: str, width: float) -> str:
        rows = []
        for i, label in enumerate(("before", "in the archive" if f.packed else "with tzip, estimated")):
            whole = sum(pair[i] for pair in parts.values())
            sized = [Part(role, pair[i], f"{PARTS[role]} {size_text(pair[i])}") for role, pair in parts.items() if pair[i]]
            rows.append((label, size_text(whole), sized))
        words = "; ".join(f"{PARTS[r]}: {size_text(a)} before, {size_text(b)} after" for r, (a, b) in parts.items())
        return stacked(key, "What the bytes consist of", words, rows, width)

    items = "".join(
        f'<li><i class="chip {role}"></i>{PARTS[role]}: {size_text(a)} → {size_text(b)}'
        f"{'' if role == 'p6' else f' ({change_text(a, b)})'}</li>"
        for role, (a, b) in parts.items()
    )
    caption = (
        "Exponents of weights repeat, and shrink; most mantissa bits are noise, which no lossless coder can shrink. "
        "The first mantissa bits are counted as exponents where they are coded with them."
    )
    return _section("anatomy", "What the bytes consist of", _both("a", draw, caption, f'<ul class="legend">{items}</ul>'))


def _exponents(f: Figures) -> str:
    """Draw which exponents occur, by kind of tensor."""
    kinds: dict[str, list[Tensor]] = {}
    for t in f.tensors:
        if t.exponents is not None and t.exponents.shares:
            kinds.setdefault(f"{kind_of(t.name)}", []).append(t)
    order = _by_size(kinds)
    window = _window([t for ts in kinds.values() for t in ts])
    if not window:
        return ""
    zeros = any(t.exponents is not None and t.exponents.zero > 0.001 for ts in kinds.values() for t in ts)

    def draw(key: str, width: float) -> str:
        rows = [_heat_row(name, ts, window, zeros) for name, ts in order[: _KINDS[width]]]
        every = next(n for n in (1, 2, 4, 8) if n == 8 or len(window) <= n * (12 if width > 600 else 6))
        first = int(zeros)
        ticks = [(first + k, power_text(e)) for k, e in enumerate(window) if e % every == 0 and (k > 1 or not zeros)]
        if zeros:
            ticks.insert(0, (0, "0"))
        words = "; ".join(f"{row.label}: {row.text}" for row in rows)
        return heat(key, "Exponents in use, by kind of tensor", words, rows, ticks, width)

    more = f" Shown are those with most bytes, of {len(order)} kinds of tensors." if len(order) > _KINDS[_NARROW] else ""
    caption = (
        f"How often each power of two occurs, within samples of {plural(f.looked, 'tensor')}: the stronger the colour, the "
        "more often. At the end of each row the entropy: how many bits an exponent is worth, of those it takes." + more
    )
    return _section("exponents", "Exponents in use", _both("e", draw, caption))


def _window(tensors: Iterable[Tensor]) -> range:
    """Return the exponents that are drawn: nearly all that occur."""
    weights: Counter[int] = Counter()
    for t in tensors:
        if t.exponents is not None:
            for e, share in t.exponents.shares.items():
                weights[e] += round(1e6 * share)
    total, low, high = sum(weights.values()), 0, 0
    keys = sorted(weights)
    if not keys or not total:
        return range(0)
    while low < len(keys) - 1 and sum(weights[k] for k in keys[: low + 1]) * 1000 < total:
        low += 1
    while high < len(keys) - 1 - low and sum(weights[k] for k in keys[len(keys) - 1 - high :]) * 5000 < total:
        high += 1
    last = keys[len(keys) - 1 - high]
    return range(max(keys[low], last - _COLUMNS + 1), last + 1)


def _heat_row(name: str, tensors: Sequence[Tensor], window: range, zeros: bool) -> HeatRow:
    shares = [0.0] * (len(window) + zeros)
    bits = total = 0.0
    width = 0
    for t in tensors:
        found = t.exponents
        if found is None:
            continue
        total += t.elements
        bits += t.elements * found.entropy
        width = max(width, found.bits)
        for e, share in found.shares.items():
            if e in window:
                shares[e - window.start + zeros] += share * t.elements
        if zeros:
            shares[0] += found.zero * t.elements
    whole = total or 1.0
    return HeatRow(_times(name, len(tensors)), [s / whole for s in shares], f"{bits / whole:.2f} of {width} bits")


def _spark(found: Exponents, window: range) -> str:
    """Return a small drawing of the exponents of one tensor."""
    most = max((found.shares.get(e, 0.0) for e in window), default=0.0)
    if not most:
        return ""
    path, at = "M0 20", 20
    for e in window:
        top = 20 - round(19 * (found.shares.get(e, 0.0) / most) ** 0.5)
        path += (f"v{top - at}" if top != at else "") + "h3"
        at = top
    used = sorted(found.shares)
    label = f"exponents from {power_text(used[0])} to {power_text(used[-1])}"
    return (
        f'<svg class="spark" role="img" aria-label="{label}" viewBox="0 0 {3 * len(window)} 20">'
        f'<path d="{path}V20z"/></svg>'
    )


# ---- the page


def _section(key: str, title: str, body: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>{body}</section>'


def _hero(f: Figures) -> str:
    saved, alone = saved_share(f.size, f.after), saved_share(f.size, f.alone)
    sign = circa(f)
    what = f"{sign}{size_text(f.after)}, {change_text(f.size, f.after)}"
    if not f.size:
        words = "An empty file"
    elif f.packed:
        words = "tzip could not make it smaller"
        if saved > 0:
            words = f"tzip stores it in {size_text(f.after)}: <b>{100 * saved:.1f} % smaller</b>"
        if f.bases and saved > 0:
            words += f", and needs {', '.join(map(escaped, f.bases[:3]))} to restore it"
    elif saved < 0.005:
        words = "tzip would hardly make it smaller"
    else:
        words = f"tzip would make it <b>about {100 * saved:.1f} % smaller</b>"
        if f.based:
            words += f" with its base{'' if len(f.bases) == 1 else 's'}, {100 * alone:.1f} % without"
    rows = [("now" if not f.packed else "before", size_text(f.size), 1.0, "saved")]
    if f.based and not f.packed:
        rows.append(("tzip alone", f"{sign}{size_text(f.alone)}, {change_text(f.size, f.alone)}", 1 - alone, "kept"))
        rows.append(("tzip with the base", what, 1 - saved, "kept"))
    else:
        rows.append(("with tzip" if not f.packed else "archive", what, 1 - saved, "kept"))
    lines = "".join(
        f'<div class="row"><span>{label}</span><span class="track"><i class="{role}" '
        f'style="width:{100 * min(max(part, 0), 1):.2f}%"></i></span><span>{text}</span></div>'
        for label, text, part, role in rows
    )
    return f'<section class="hero" aria-label="Summary"><p class="big">{words}.</p>{lines if f.size else ""}</section>'


def _cards(f: Figures) -> str:
    elements = sum(t.elements for t in f.tensors)
    types = Counter[str]()
    for t in f.tensors:
        types[t.dtype] += t.own
    rest = f.size - sum(t.own for t in f.tensors)
    cards = [
        ("Size", size_text(f.size), f"{f.size:,} bytes"),
        ("Archive", size_text(f.after), f"{round(f.after):,} bytes")
        if f.packed
        else ("With tzip", circa(f) + size_text(f.after), "an estimate"),
        ("Tensors", f"{len(f.tensors):,}", f"{count_text(elements)} elements"),
        ("Element types", ", ".join(n for n, _ in types.most_common(3)) or "–", _shares(types)),
    ]
    if rest:
        cards.append(("In no tensor", size_text(rest), "headers, names, other data"))
    if f.repeats:
        sure = "stored once" if f.packed else "by samples; would be stored once"
        cards.append(("There already", size_text(f.repeats), sure))
    if f.bases or f.based:
        cards.append(("Differences", f"{plural(f.based, 'tensor')}", "from " + ", ".join(map(clean, f.bases[:2]))))
    items = "".join(
        f"<div><dt>{k}</dt><dd>{html.escape(v)}<small>{html.escape(more)}</small></dd></div>" for k, v, more in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _shares(types: "Counter[str]") -> str:
    total = sum(types.values())
    if len(types) < 2 or not total:
        return "all of them" if types else "none"
    return ", ".join(f"{share_text(n / total)} {name}" for name, n in types.most_common(2))


def _found(f: Figures) -> str:
    """Say what was found: structure, codecs, and what the archive says of itself."""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}<small>{_STRUCTURES.get(name, '')}</small></th><td>{size_text(s.before)}</td>"
        f"<td>{circa(f)}{size_text(s.after)}</td><td>{change_text(s.before, s.after)}</td></tr>"
        for name, s in sorted(f.structures.items(), key=lambda row: -row[1].before)
    )
    table = (
        '<table class="plain"><thead><tr><th scope=col>Structure</th><th scope=col>Before</th><th scope=col>After</th>'
        f"<th scope=col>Change</th></tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else ""
    )
    facts = list(f.facts)
    codecs = ", ".join(f"{name} {size_text(n)}" for name, n in sorted(f.codecs.items(), key=lambda c: -c[1]) if n)
    if codecs:
        facts.append(("Bytes by codec", circa(f) + codecs))
    if f.bases:
        facts.append(("Bases", ", ".join(map(clean, f.bases[:8]))))
    items = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    notes = "".join(f'<li>{escaped(w)}</li>' for w in f.warnings[:20])
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    if not table and not items and not notes:
        return ""
    title = "What was found" if f.packed else "What tzip finds in the samples"
    return _section("found", title, f'{notes}{table}<dl class="facts">{items}</dl>')


def _table(f: Figures) -> str:
    if not f.tensors:
        return _section("tensors", "Tensors", "<p>There are no tensors in it that tzip knows: all of it is plain bytes.</p>")
    order = sorted(range(len(f.tensors)), key=lambda i: (-f.tensors[i].nbytes, i))
    shown = sorted(order[:_ROWS])
    window = _window(t for t in f.tensors if t.exponents is not None and t.exponents.shares)
    body = "".join(_row(f, f.tensors[i], window) for i in shown)
    rest = [f.tensors[i] for i in order[_ROWS:]]
    foot = ""
    if rest:
        own, after = sum(t.own for t in rest), sum(t.after for t in rest)
        foot = (
            f"<tfoot><tr><th scope=row>{plural(len(rest), 'smaller tensor')} that are not listed</th>"
            f"<td class=z>{size_text(own)}</td><td>{circa(f)}{size_text(after)}"
            f"<small>{change_text(own, after)}</small></td><td></td><td class=x></td></tr></tfoot>"
        )
    word = "In the archive" if f.packed else "With tzip"
    classes = {"Exponents": " class=x", "Size": " class=z"}  # left out where there is no room
    heads = "".join(
        f'<th scope=col{classes.get(name, "")} aria-sort=none><button type=button>{name}</button></th>'
        for name in ("Tensor", "Size", word, "Bits an element", "Exponents")
    )
    caption = f"{plural(len(f.tensors), 'tensor')} in the order of the file"
    if rest:
        caption += f"; the {len(shown)} largest are listed"
    return _section(
        "tensors",
        "Tensors",
        '<div class="tools" hidden><label for="q">Find</label><input id="q" type="search" '
        'placeholder="name, type, shape, note" autocomplete="off" spellcheck="false">'
        '<output id="n" aria-live="polite"></output></div>'
        f'<table id="t"><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>{foot}</table>'
        '<p class="tools" hidden><button id="all" type="button">Show all rows</button></p>',
    )


def _row(f: Figures, t: Tensor, window: range) -> str:
    shape = " × ".join(map(str, t.shape[:8])) + (" …" if len(t.shape) > 8 else "") if t.shape else "scalar"
    note = f" · {escaped(t.note)}" if t.note else ""
    bits = before = 0.0
    if t.elements and t.own == t.nbytes:
        bits, before = 8 * t.after / t.elements, 8 * t.nbytes / t.elements
    meter = f'<span class="meter"><i style="width:{min(100.0, 100 * bits / before):.0f}%"></i></span>' if before else ""
    written = f"{bits:.2f}<small>of {before:g}</small>{meter}" if before else "–"
    found = t.exponents
    spark = ""
    if found is not None:
        spark = f"{_spark(found, window)}<small>{found.entropy:.2f} of {found.bits} bits</small>"
    after = "–"
    if t.own:
        of = f'<span class="only">of {size_text(t.own)}</span>'
        after = f"{circa(f)}{size_text(t.after)}<small>{of} {change_text(t.own, t.after)}</small>"
    return (
        f"<tr><th scope=row><bdi>{breakable(t.name)}</bdi><small>{escaped(t.dtype)} · {shape}{note}</small></th>"
        f'<td class=z data-v="{t.nbytes}">{size_text(t.nbytes)}</td><td data-v="{t.after:.0f}">{after}</td>'
        f'<td data-v="{bits:.4f}">{written}</td><td class=x data-v="{found.entropy if found else -1:.4f}">{spark}</td></tr>'
    )


def _method(f: Figures) -> str:
    if f.packed:
        words = ["All sizes are exact, from the index and the chunks of the archive."]
    else:
        words = [
            "Sizes, names, types and shapes are exact.",
            "What tzip would make of the file is an estimate."
            if not f.sampled
            else f"What tzip would make of the file is an estimate: samples of {size_text(f.sampled)} in all were encoded at "
            "the default level, and the result scaled up.",
        ]
        if f.unseen:
            words.append(f"{size_text(f.unseen)} were not sampled, and are taken to be like others of their type.")
        if f.repeats:
            words.append("Tensors are said to hold the same bytes when samples at 32 places agree; packing compares all bytes.")
        words.append("<code>tzip bench</code> measures every level, and speeds, on more of it.")
    if f.looked:
        words.append(
            f"Exponents and their entropy are those of samples, of up to 16,384 elements each, of {plural(f.looked, 'tensor')}."
        )
    words.append("kB, MB and GB are powers of 1000.")
    text = " ".join(words)
    return f"<footer><h2>How these figures were made</h2><p>{text}</p><p>tzip {html.escape(__version__)}</p></footer>"


def page(f: Figures) -> str:
    """Return the page, complete in itself: its policy forbids any request, and any script but its own."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    name = escaped(f.name)
    kind = html.escape(f.container) + ("" if f.packed else " file") if f.container else "a file of no kind that tzip knows"
    body = "".join(part(f) for part in (_hero, _cards, _map, _kinds, _anatomy, _exponents, _found, _table, _method))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{policy}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{name} – tzip</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body>\n<a class="skip" href="#tensors">To the table of tensors</a>\n<main>\n<header><p class="kind">{kind}</p>'
        f"<h1><bdi>{name}</bdi></h1></header>\n{body}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
