"""The page about a file: complete in itself, safe from names, true in its figures, readable on a phone and in the dark."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from forge import noise, safetensors_bytes, weights

import tzip
from tzip.formats.dtypes import BY_NAME
from tzip.inspecting import describe

pytest.importorskip("matplotlib", reason="reports need matplotlib")

from tzip.report import report
from tzip.report_page import clean, size_text

VOID = {"meta", "input", "br", "img", "link", "wbr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg><b>",
    "' onclick='alert(1)",
    "&lt;i&gt;&#60;",
    r"$\frac{1}{$ $$x^$",
    "line\nbreak\ttab\0null",
    "\u202eturned\u2066",
    "漢字.重み",
    "https://example.com/x.js",
    "x" * 5000,
    "",
)


class Page(HTMLParser):
    """Parses a page; fails when elements are not closed in order, or an id occurs twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.ids: set[str] = set()
        self.rows: list[list[str]] = []
        self.values: list[list[str]] = []
        self.words: list[str] = []
        self.names: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = {k: v or "" for k, v in attrs}
        self.elements.append((tag, values))
        if "id" in values:
            assert values["id"] not in self.ids, values["id"]
            self.ids.add(values["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "bdi" and "table" in self.open:
            self.names.append("")
        if tag == "tr":
            self.values.append([])
        if "data-v" in values:
            self.values[-1].append(values["data-v"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)
        if self.open[-1:] == ["bdi"] and "table" in self.open:
            self.names[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    @property
    def table(self) -> dict[str, list[float]]:
        """Size, size after, bits and entropy, by name."""
        values = [[float(v) for v in row] for row in self.values if row]
        return dict(zip(self.names, values, strict=True))


def parsed(path, **options) -> Page:
    return Page(report(path, **options))


def write(path: Path, tensors, **options) -> Path:
    path.write_bytes(safetensors_bytes(tensors, **options))
    return path


def floats(name: str, n: int, seed: int = 0, dtype: str = "BF16"):
    return (name, dtype, [n], weights(n, seed, dtype))


MODEL = [
    ("layers.0.up.weight", "BF16", [400, 256], weights(400 * 256, 1)),
    ("layers.0.up.bias", "BF16", [256], weights(256, 2)),
    ("layers.1.up.weight", "BF16", [400, 256], weights(400 * 256, 3)),
    ("head", "F32", [300, 256], weights(300 * 256, 4, "F32")),
    ("mask", "U8", [100_000], bytes(100_000)),
    ("steps", "I64", [], (7).to_bytes(8, "little")),
    ("none", "F16", [0, 7], b""),
]


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.safetensors", MODEL, metadata={"format": "pt"})


# ---------------------------------------------------------------- the page


def check_safe(text: str, page: Page) -> None:
    """Raise when the page asks for anything, or has a script but its own."""
    for tag, values in page.elements:
        assert tag not in {"img", "link", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
        assert not [k for k in values if k.startswith("on") or k in {"src", "srcset", "action", "xlink:href"}]
        assert values.get("href", "#").startswith("#")
        assert "url(" not in values.get("style", "").replace("url(#", "")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1
    assert not re.search(r"@import|url\(", style[0])


def test_a_page_is_complete_in_itself(model):
    text = report(model)
    page = Page(text)
    check_safe(text, page)
    assert not re.search("https?:", text)
    assert text.isprintable() or not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    assert len(text.encode()) < 300_000
    assert page.elements[0] == ("html", {"lang": "en"})


def test_drawings_have_titles_and_descriptions(model):
    page = parsed(model)
    drawings = [values for tag, values in page.elements if tag == "svg"]
    assert len([d for d in drawings if d["class"] == "chart"]) == 8
    for drawing in drawings:
        assert drawing["role"] == "img"
        if drawing["class"] == "chart":
            assert set(drawing["aria-labelledby"].split()) <= page.ids
        else:
            assert drawing["aria-label"]
    assert {"viewport", "color-scheme"} <= {v["name"] for t, v in page.elements if t == "meta" and "name" in v}


def test_drawings_take_their_colours_from_the_page(model):
    drawings = "".join(re.findall(r'<svg class="chart".*?</svg>', report(model), re.DOTALL))
    assert "var(--kept)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)
    assert "DejaVu" not in drawings
    assert "sans-serif" not in drawings


@pytest.mark.parametrize("packed", [False, True])
def test_names_cannot_do_anything(tmp_path, packed):
    tensors = [floats(name, 2000 + i, i) for i, name in enumerate(NASTY)]
    path = write(tmp_path / ("m.safetensors" if packed else "a <b>&'\"$x$.safetensors"), tensors)
    if packed:
        tzip.pack(path, tmp_path / "m.tzip")
        path = tmp_path / "m.tzip"
    text = report(path)
    page = Page(text)
    check_safe(text, page)
    assert "<script>alert" not in text
    assert "<b>" not in re.sub(r"<b>about|<b>[\d.]+ %", "", text)
    assert [clean(n) for n in NASTY] == page.names
    assert html.escape(NASTY[0]) in text
    assert not re.search("[\u202e\u2066\0]", text)
    assert "x" * 200 not in text
    if not packed:
        assert "a &lt;b&gt;&amp;" in text


def test_names_that_are_no_unicode(tmp_path):
    path = tmp_path / os.fsdecode(b"m\xff.safetensors") if sys.platform == "linux" else tmp_path / "m.safetensors"
    write(path, [floats("half\ud800", 5000)])
    page = parsed(path)
    assert "m\ufffd.safetensors" in page.text or sys.platform != "linux"
    assert page.text.encode()


def test_names_are_cut_in_their_middle():
    assert clean("x" * 160) == "x" * 160
    assert len(clean("begin" + "x" * 1000 + "end")) == 160
    assert clean("begin" + "x" * 1000 + "end").startswith("begin")
    assert clean("begin" + "x" * 1000 + "end").endswith("end")


def test_sizes_have_units():
    assert [size_text(n).replace("\u00a0", " ") for n in (0, 999, 1000, 45_442_016, 999_999_999, 5e12)] == [
        "0 B", "999 B", "1.00 kB", "45.44 MB", "1.00 GB", "5.00 TB",
    ]  # fmt: skip


def test_the_page_is_the_same_each_time(model):
    first = report(model)
    assert report(model) == first
    assert report(model, threads=3) == first


def test_without_matplotlib_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(tzip.UsageError, match=r"tensor-tzip\[report\]"):
        report(model)


# ---------------------------------------------------------------- figures of files


def test_sizes_of_a_file_are_exact(model):
    page = parsed(model)
    assert {name: row[0] for name, row in page.table.items()} == {name: len(raw) for name, _, _, raw in MODEL}
    assert f"{model.stat().st_size:,} bytes" in page.text
    assert "7 tensors" in page.text.lower()
    rest = model.stat().st_size - sum(len(raw) for *_, raw in MODEL)
    assert size_text(rest).replace("\u00a0", " ") in page.text


def test_estimates_are_near_what_packing_makes(tmp_path):
    path = write(tmp_path / "m.safetensors", [floats("w", 1 << 21), floats("f", 1 << 20, 1, "F32"), floats("s", 5000, 2)])
    done = tzip.pack(path, tmp_path / "m.tzip")
    before, after = parsed(path), parsed(tmp_path / "m.tzip")
    told = {name: row[1] for name, row in before.table.items()}
    assert sum(told.values()) == pytest.approx(done.bytes_out, rel=0.01)
    for name, row in after.table.items():
        assert told[name] == pytest.approx(row[1], rel=0.01)
        assert before.table[name][2] == pytest.approx(row[2], rel=0.01)


def test_large_files_are_sampled(tmp_path, monkeypatch):
    from tzip import report as module

    monkeypatch.setattr(module, "_BUDGET", 1 << 20)
    read = []
    path = write(tmp_path / "m.safetensors", [floats("w", 1 << 22), floats("v", 1 << 20, 1)])
    encode = module.encode_chunk
    monkeypatch.setattr(module, "encode_chunk", lambda raw, *a: read.append(raw.size) or encode(raw, *a))
    page = parsed(path)
    assert (1 << 19) < sum(read) <= 1 << 20
    assert f"samples of {size_text(sum(read))}".replace("\u00a0", " ") in page.text
    done = tzip.pack(path, tmp_path / "m.tzip")
    assert sum(row[1] for row in page.table.values()) == pytest.approx(done.bytes_out, rel=0.02)


def test_runs_beyond_the_sample_are_said_to_be_like_others(tmp_path, monkeypatch):
    from tzip import report as module

    monkeypatch.setattr(module, "_RUNS", 4)
    path = write(tmp_path / "m.safetensors", [floats(f"w{i}", 70_000, i) for i in range(20)])
    page = parsed(path)
    done = tzip.pack(path, tmp_path / "m.tzip")
    assert sum(row[1] for row in page.table.values()) == pytest.approx(done.bytes_out, rel=0.02)
    assert "not sampled: as others of its type" in page.text
    assert "were not sampled" in page.text


def test_entropy_of_exponents(tmp_path):
    half = np.repeat(np.array([1.0, 2.0], "<f4"), 4096)
    values = np.random.default_rng(0).permutation(half)
    path = write(tmp_path / "m.safetensors", [("w", "F32", [8192], values.tobytes()), floats("v", 100)])
    page = parsed(path)
    assert page.table["w"][3] == 1.0
    assert "1.00 of 8 bits" in page.text


def test_zeros_and_infinities_are_no_exponents():
    from tzip import report as module

    values = np.array([0.0, -0.0, 1e-45, 1.0, 1.5, -4.0, np.inf, np.nan], "<f4")
    found = module._exponents(values.view(np.uint8), BY_NAME["F32"])
    assert found is not None
    assert (found.shares, found.zero, found.special) == ({0: 0.25, 2: 0.125}, 0.375, 0.25)
    assert (found.bits, found.elements) == (8, 8)
    # The largest exponent of E4M3 has numbers, too.
    eights = module._exponents(np.array([0x78, 0x00, 0x38, 0x38], np.uint8), BY_NAME["F8_E4M3"])
    assert eights is not None
    assert (eights.shares, eights.zero, eights.special) == ({8: 0.25, 0: 0.5}, 0.25, 0.0)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "C64", "F8_E4M3", "F8_E5M2"])
def test_exponents_of_all_floats(tmp_path, dtype):
    raw = noise(16 * 512, 3)
    n = len(raw) * 8 // {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8}[dtype]
    page = parsed(write(tmp_path / "m.safetensors", [("w", dtype, [n], raw)]))
    bits = {"BF16": 8, "F16": 5, "F64": 11, "F8_E4M3": 4, "F8_E5M2": 5}.get(dtype, 8)
    assert 0.85 * bits < page.table["w"][3] <= bits


def test_what_is_held_twice(tmp_path):
    tensors = [floats("a", 100_000), floats("b", 100_000), floats("c", 100_000, 1), floats("d", 100_000, 2)]
    path = write(tmp_path / "m.safetensors", tensors)
    page = parsed(path)
    assert page.table["b"][1] == 0
    assert page.table["c"][1] > 100_000
    assert "same bytes as a, by samples" in page.text
    assert "200 kB" in page.text
    done = tzip.pack(path, tmp_path / "m.tzip")
    assert sum(row[1] for row in page.table.values()) == pytest.approx(done.bytes_out, rel=0.02)
    packed = parsed(tmp_path / "m.tzip")
    assert packed.table["b"][1] == 0
    assert "same bytes as another tensor" in packed.text


def moved(path: Path, tensors, seed: int = 9) -> Path:
    """Write a file like another one, a few bits of its floats moved."""
    out = []
    for name, dtype, shape, raw in tensors:
        if dtype in ("BF16", "F32"):
            words = np.frombuffer(raw, "<u2" if dtype == "BF16" else "<u4")
            words = words + np.random.default_rng(seed).integers(0, 3, words.size).astype(words.dtype)
            out.append((name, dtype, shape, words.tobytes()))
        else:
            out.append((name, dtype, shape, raw))
    return write(path, out)


def test_what_a_base_would_save(model, tmp_path):
    later = moved(tmp_path / "later.safetensors", MODEL)
    alone, based = parsed(later), parsed(later, base=model)
    done = tzip.pack(later, tmp_path / "later.tzip", base=model)
    assert sum(row[1] for row in based.table.values()) == pytest.approx(done.bytes_out, rel=0.05)
    assert sum(row[1] for row in based.table.values()) < 0.5 * sum(row[1] for row in alone.table.values())
    assert "difference from model.safetensors" in based.text
    assert "with its base" in based.text
    assert "tzip alone" in based.text
    assert "tzip alone" not in alone.text


def test_a_base_that_does_not_help(tmp_path):
    model = write(tmp_path / "m.safetensors", [floats("w", 100_000)])
    other = write(tmp_path / "other.safetensors", [floats("x", 70_000, 3)])
    page = parsed(model, base=other)
    assert "with its base" not in page.text
    with pytest.raises(tzip.UsageError):
        report(model, base=tmp_path / "missing")


# ---------------------------------------------------------------- figures of archives


def test_figures_of_an_archive_are_those_of_the_archive(model, tmp_path):
    target = tmp_path / "m.tzip"
    tzip.pack(model, target)
    page = parsed(target)
    with tzip.open(target) as archive:
        infos = {t.name: t for t in archive.tensors()}
    assert {name: row[0] for name, row in page.table.items()} == {name: t.nbytes for name, t in infos.items()}
    for name, row in page.table.items():
        assert abs(row[1] - infos[name].stored) <= 1
    assert f"{target.stat().st_size:,} bytes" in page.text
    assert f"{model.stat().st_size:,} bytes" in page.text
    for row in describe(target)["transforms"]:
        for n in (row["bytes"], row["stored"]):
            assert size_text(n).replace("\u00a0", " ") in page.text
    assert "≈" not in page.text
    assert "estimate" not in page.text


def test_an_archive_of_differences(model, tmp_path):
    later = moved(tmp_path / "later.safetensors", MODEL)
    target = tmp_path / "away" / "later.tzip"
    target.parent.mkdir()
    tzip.pack(later, target, base=model)
    page = parsed(target)
    assert "needs model.safetensors to restore it" in page.text
    assert "difference from model.safetensors" in page.text
    assert "The exponents of differences are not shown" in page.text
    assert page.table["layers.0.up.weight"][3] == -1
    with_base = parsed(target, base=model)
    assert with_base.table["layers.0.up.weight"][3] > 1
    assert "are not shown" not in with_base.text
    with pytest.raises(tzip.BaseNotFoundError):
        report(target, base=later)


def test_an_archive_of_a_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "a.safetensors", [floats("w", 70_000)])
    write(folder / "b.safetensors", [floats("w", 80_000, 1)])
    (folder / "config.json").write_text("{}")
    tzip.pack(folder, tmp_path / "m.tzip")
    page = parsed(tmp_path / "m.tzip")
    assert set(page.names) == {"model/a.safetensors: w", "model/b.safetensors: w"}
    assert "Files in it 3" in page.text
    with pytest.raises(tzip.UsageError, match="folder"):
        report(folder)


def test_an_archive_of_one_tensor(tmp_path):
    path = tmp_path / "one.tzip"
    path.write_bytes(tzip.encode(np.arange(100_000, dtype="f4")))
    page = parsed(path)
    assert [row[0] for row in page.values if row] == ["400000"]
    assert "1 tensor " in page.text


def test_a_file_packed_in_place(tmp_path):
    path = write(tmp_path / "m.safetensors", [floats("w", 100_000)])
    tzip.pack_in_place([path])
    page = parsed(path)
    assert page.names == ["w"]
    assert "tzip archive" in page.text
    assert f"{path.stat().st_size:,} bytes" in page.text


def test_damaged_archives_are_errors(model, tmp_path):
    target = tmp_path / "m.tzip"
    tzip.pack(model, target)
    data = target.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    with pytest.raises(tzip.TruncatedError):
        report(target)
    with pytest.raises(FileNotFoundError):
        report(tmp_path / "missing")


# ---------------------------------------------------------------- little, much, odd


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    page = parsed(path)
    assert "An empty file" in page.text
    assert "no tensors" in page.text
    tzip.pack(path, tmp_path / "m.tzip")
    assert "no tensors" in parsed(tmp_path / "m.tzip").text


def test_a_file_without_tensors(tmp_path):
    path = tmp_path / "text"
    path.write_text(json.dumps(list(range(5000))))
    page = parsed(path)
    assert "no tensors" in page.text
    assert "a file of no kind that tzip knows" in page.text
    assert page.names == []
    path = write(tmp_path / "none.safetensors", [])
    assert "no tensors" in parsed(path).text


def test_empty_and_single_elements(tmp_path):
    tensors = [("scalar", "F32", [], b"\0\0\x80?"), ("empty", "F32", [0], b""), ("flat", "BF16", [3, 0, 5], b"")]
    page = parsed(write(tmp_path / "m.safetensors", tensors))
    assert {name: row[0] for name, row in page.table.items()} == {"scalar": 4, "empty": 0, "flat": 0}
    assert "scalar" in page.text
    assert "3 × 0 × 5" in page.text
    path = write(tmp_path / "empty.safetensors", tensors[1:])
    page = parsed(path)
    assert page.names == ["empty", "flat"]
    tzip.pack(path, tmp_path / "m.tzip")
    assert parsed(tmp_path / "m.tzip").names == ["empty", "flat"]


def test_a_damaged_file_is_told_of(tmp_path):
    path = write(tmp_path / "m.npz", [])
    np.savez(path, a=np.zeros(100))
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    page = parsed(path)
    assert "plain bytes" in page.text


@pytest.mark.parametrize("packed", [False, True])
def test_thousands_of_tensors(tmp_path, packed):
    long = "a.rather.long.name.of.a.part.of.a.mixture.of.experts"
    tensors = [floats(f"model.layers.{i % 50}.{long}.{i}.<weight>", 64 + i, i) for i in range(6000)]
    path = write(tmp_path / "m.safetensors", tensors)
    if packed:
        tzip.pack(path, tmp_path / "m.tzip")
        path = tmp_path / "m.tzip"
    text = report(path)
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    assert "6,000 tensors" in page.text
    assert "5,500 smaller tensors that are not listed" in page.text
    assert len(page.names) == 500


@pytest.mark.parametrize("kind", ["npy", "npz", "tar", "nested"])
def test_other_containers(tmp_path, kind):
    import tarfile

    array = np.random.default_rng(0).normal(0, 0.02, (300, 256)).astype("f4")
    path = tmp_path / f"m.{kind}"
    if kind == "npy":
        np.save(path, array)
    elif kind == "npz":
        np.savez(path, array=array)
    else:
        np.save(tmp_path / "array.npy", array)
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "array.npy", "folder/array.npy")
    page = parsed(path)
    assert next(row for row in page.values if row)[0] == str(array.nbytes)
    assert f"{path.stat().st_size:,} bytes" in page.text


def test_tensors_that_share_bytes(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.randn(1000, 300)
    path = tmp_path / "m.pt"
    torch.save({"a": whole, "again": whole, "part": whole[:10], "turned": whole.t()}, path)
    page = parsed(path)
    assert page.table["a"][0] == page.table["again"][0] == page.table["turned"][0] == 1_200_000
    assert sum(row[1] for row in page.table.values()) < 1_200_000
    assert "same bytes as another tensor" in page.text
    tzip.pack(path, tmp_path / "m.tzip")
    packed = parsed(tmp_path / "m.tzip")
    assert sum(row[1] for row in packed.table.values()) <= (tmp_path / "m.tzip").stat().st_size


# ---------------------------------------------------------------- in a browser


def chromium(folder: Path, page: Path, width: int, dark: bool, *options: str) -> str:
    done = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}",
         f"--window-size={width},2000", f"--blink-settings=preferredColorScheme={int(not dark)}", *options, page.as_uri()],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    long = "a.very.long.name.that.has.to.be.broken.or.cut.weight"
    tensors = [*MODEL, *[floats(f"layers.{i}.{long}", 70_000, i) for i in range(60)]]
    path = write(folder / "model.safetensors", tensors)
    page = folder / "page.html"
    page.write_text(report(path), encoding="utf-8")
    return page


@browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_screenshots(tmp_path, page_file, width, dark):
    from PIL import Image

    shot = tmp_path / "shot.png"
    chromium(tmp_path / "user", page_file, width, dark, f"--screenshot={shot}")
    image = np.asarray(Image.open(shot).convert("L")).astype(float)
    assert image.shape == (2000, width)
    assert bool(image.mean() < 90) is dark
    assert image.std() > 20


def probe(tmp_path: Path, page_file: Path, width: int, script: str) -> str:
    """Return what an expression says in the page, which has to be let in: the page's policy forbids other scripts."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page_file.read_text(encoding="utf-8"))
    page = tmp_path / "probe.html"
    page.write_text(text.replace("</body>", f"<script>document.title = {script}</script></body>"), encoding="utf-8")
    dom = chromium(tmp_path / "user", page, width, False, "--dump-dom")
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found
    return found[1]


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(tmp_path, page_file, width):
    # Without a screenshot the window has 500 pixels at least, for which the same rules of style hold.
    said = probe(tmp_path, page_file, width, f"(() => {{ document.body.style.width = '{width}px'; "
                 "const shown = [...document.querySelectorAll('#t th[aria-sort]')].filter(h => h.offsetWidth).length; "
                 "return [document.body.scrollWidth, shown].join() })()")  # fmt: skip
    assert said == f"{width},{5 if width > 840 else 3}"


@browser
def test_search_sort_and_rows_to_begin_with(tmp_path, page_file):
    count = "[...document.querySelectorAll('#t tbody tr')].filter(r => !r.hidden).length"
    search = "(() => { q.value = 'head f32'; q.dispatchEvent(new Event('input')); return " + count + " })()"
    largest = (
        "(() => { q.value = ''; const h = document.querySelectorAll('#t th')[1]; h.click(); "
        "return document.querySelector('#t tbody tr').cells[0].textContent.slice(0, 4) + h.getAttribute('aria-sort') })()"
    )
    everything = f"(() => {{ all.click(); return {count} }})()"
    cell = "(() => { document.querySelector('#map .cell').dispatchEvent(new Event('click')); return " + count + " >= 1 })()"
    said = probe(tmp_path, page_file, 1280, f"[{count}, {search}, {largest}, {everything}, {cell}].join()")
    assert said == "40,1,headdescending,67,true"


@browser
def test_the_policy_lets_the_page_s_own_script_in_and_no_other(tmp_path, page_file):
    text = page_file.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'broken'</script></body>")
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    dom = chromium(tmp_path / "user", page, 1280, False, "--dump-dom")
    assert "<title>model.safetensors" in dom
    assert '<div class="tools">' in dom
