"""tar files, written by tarfile and GNU tar: regular files are where `find` says, and no damage escapes it."""

import io
import random
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from forge import reader

from tzip.formats import tar_files
from tzip.formats.containers import ContainerError, Contents

RNG = np.random.default_rng(8)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PREFIXED = "/".join(["folder"] * 20) + "/file"  # more than 100 bytes, which ustar still can say
FILES = {
    "a.bin": RNG.bytes(1000),
    "folder/leer": b"",
    "exact": RNG.bytes(1024),
    PREFIXED: RNG.bytes(3),
    "größe/ü€.bin": RNG.bytes(513),
}
LONG = {"x" * 200: b"1", "y/" * 300 + "ü" * 90: b"22"}


def archive(files=FILES, form: int = tarfile.PAX_FORMAT, **attributes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as t:
        for name, data in files.items():
            t.addfile(member(name, len(data), **attributes), io.BytesIO(data))
    return file.getvalue()


def member(name: str, size: int = 0, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def look(raw: bytes) -> Contents | None:
    found = tar_files.find(reader(raw), len(raw))
    free = 0
    for inner in found.files if found else ():
        assert free <= inner.begin <= inner.end <= len(raw)
        assert inner.name.encode() is not None
        free = inner.end
    return found


def assert_holds_what_tarfile_reads(raw: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as t:
        expected = [(m.name, t.extractfile(m).read()) for m in t if m.isreg() and not m.issparse()]
    found = look(raw)
    assert [(f.name, raw[f.begin : f.end]) for f in found.files] == expected
    assert (found.container, found.regions, found.tensors, found.warnings) == ("tar", [], [], [])


@pytest.mark.parametrize("form", FORMATS)
def test_what_tarfile_writes(form):
    raw = archive(FILES if form == "ustar" else FILES | LONG, FORMATS[form])
    assert_holds_what_tarfile_reads(raw)
    assert len(look(raw).files) == len(FILES) + (form != "ustar") * len(LONG)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_regular_file_is_passed_over(form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as t:
        t.addfile(member("folder", type=tarfile.DIRTYPE))
        t.addfile(member("first", 3), io.BytesIO(b"abc"))
        t.addfile(member("hard", type=tarfile.LNKTYPE, linkname="first"))
        t.addfile(member("soft", type=tarfile.SYMTYPE, linkname="l" * (90 if form == "ustar" else 300)))
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            t.addfile(member("device", type=kind))
        t.addfile(member("last", 600, type=tarfile.CONTTYPE), io.BytesIO(bytes(600)))
        t.addfile(member("unknown", 600, type=b"Z"), io.BytesIO(bytes(600)))
        t.addfile(member("../../etc/passwd", 1), io.BytesIO(b"a"))
        t.addfile(member("again", 1), io.BytesIO(b"a"))
        t.addfile(member("again", 1), io.BytesIO(b"b"))
    assert_holds_what_tarfile_reads(file.getvalue())
    assert [f.name for f in look(file.getvalue()).files] == ["first", "last", "../../etc/passwd", "again", "again"]


def test_pax_headers_of_many_kinds():
    records = {"path": "other/ü", "comment": "x" * 2000, "mtime": "1.5", "SCHILY.xattr.user.a": "b=c\nd"}
    raw = archive(FILES, pax_headers=records)
    assert_holds_what_tarfile_reads(raw)
    assert {f.name for f in look(raw).files} == {"other/ü"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", pax_headers={"comment": "for all", "path": "for all"}) as t:
        t.addfile(member("a", 3), io.BytesIO(b"abc"))
        t.addfile(member("z" * 200, 3), io.BytesIO(b"def"))
    assert_holds_what_tarfile_reads(file.getvalue())
    assert [f.name for f in look(file.getvalue()).files] == ["for all", "z" * 200]


def header(name: bytes = b"a", size: bytes = b"00000000003\0", kind: bytes = b"0", magic: bytes = b"ustar\0" b"00") -> bytes:
    """A header as the real one is laid out, with fields that no writer writes."""
    block = name.ljust(124, b"\0") + size.ljust(24, b"\0") + b" " * 8 + kind + bytes(100) + magic.ljust(255, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    text = b"".join(records)
    return header(b"pax", b"%011o\0" % len(text), kind) + text.ljust(-(-len(text) // 512) * 512, b"\0")


SPARSE = header(kind=b"S", magic=b"ustar  \0".ljust(225, b"\0") + b"\1")  # whose map goes on in the next block
DATA = b"abc".ljust(512, b"\0")


def test_sizes_in_all_notations():
    for size in (b"00000000003\0", b"3", b"         3 ", b"3          ", b"\x80" + bytes(10) + b"\3", b"000000000003"):
        assert_holds_what_tarfile_reads(header(size=size) + DATA + bytes(1024))
    assert_holds_what_tarfile_reads(pax(b"9 size=3\n") + header(size=b"0") + DATA + header(b"b") + DATA)
    assert [f.name for f in look(header(size=b"") + header(b"b") + DATA).files] == ["a", "b"]


def test_what_has_no_data_may_have_a_size():
    for kind in (b"1", b"5"):
        raw = header(b"other", kind=kind) + header() + DATA
        assert_holds_what_tarfile_reads(raw)
        assert len(look(raw).files) == 1


def test_fields_that_only_look_like_others():
    block = header(magic=b"ustar  \0")  # in GNU's form times stand where the prefix would
    raw = header(magic=b"ustar  \0" + bytes(80) + b"00000000000\0") + DATA
    assert raw[345:346] == b"0"
    assert [f.name for f in look(raw).files] == [f.name for f in look(block + DATA).files] == ["a"]
    assert [f.name for f in look(pax(b"8 size=\n", b"8 path=\n") + header() + DATA).files] == ["a"]


def test_a_size_of_many_gigabytes():
    """Only the headers exist; tarfile writes that of a file of 2**33 bytes in binary, or in a pax record."""
    for form in FORMATS.values():
        if form == tarfile.USTAR_FORMAT:
            continue
        head = member("big", 1 << 33).tobuf(form)
        last = member("last").tobuf(form)

        def read(at, n, head=head, last=last):
            return head[at : at + n] if at < len(head) else last[at - len(head) - (1 << 33) :][:n]

        files = tar_files.find(read, len(head) + (1 << 33) + 512).files
        assert [(f.name, f.end - f.begin) for f in files] == [("big", 1 << 33), ("last", 0)]


def test_the_old_form_and_signed_sums():
    folder = header(b"folder/", size=b"0", kind=b"\0", magic=b"")
    raw = folder + header(kind=b"\0", magic=b"") + DATA + bytes(1024)
    assert_holds_what_tarfile_reads(raw)
    assert [f.name for f in look(raw).files] == ["a"]
    block = header(b"\xfc.bin")
    signed = sum(block[:148] + block[156:]) + 256 - 256
    raw = block[:148] + b"%06o\0 " % signed + block[156:] + DATA + bytes(1024)
    assert [f.name for f in look(raw).files] == ["�.bin"]


def test_names_that_are_no_unicode():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as t:
        for name in (b"caf\xe9", b"\xff" * 150):
            t.addfile(member(name.decode("utf-8", "surrogateescape")))
    assert [f.name for f in look(file.getvalue()).files] == ["caf�", "�" * 150]
    raw = pax(b"21 hdrcharset=BINARY\n", b"13 path=caf\xe9\n") + header() + DATA
    assert [f.name for f in look(raw).files] == ["caf�"]


def test_the_end():
    raw = archive({"a": b"1"})
    assert len(raw) == tarfile.RECORDSIZE
    for end in (1024, 1024 + 512, 1024 + 1024, 1024 + 100):
        assert look(raw[:end]) == look(raw)
    assert look(raw + b"anything") == look(raw)
    assert look(raw[:2048] + archive({"b": b"1"})) == look(raw)


needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command here")


def tar(folder, *options: str) -> bytes:
    done = subprocess.run(["tar", "-cf", "-", *options, "."], cwd=folder, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"this tar command cannot: {done.stderr.decode()}")
    return done.stdout


@needs_tar
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_what_the_system_writes(tmp_path, form):
    for name, data in ({"a.bin": FILES["a.bin"]} if form == "v7" else FILES).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    if form in ("gnu", "oldgnu", "pax"):
        (tmp_path / ("z" * 150)).write_bytes(b"long")
    (tmp_path / "hard").hardlink_to(tmp_path / "a.bin")
    (tmp_path / "soft").symlink_to("a.bin")
    raw = tar(tmp_path, f"--format={form}")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as t:
        expected = {m.name: t.extractfile(m).read() for m in t if m.isreg()}
    assert {f.name: raw[f.begin : f.end] for f in look(raw).files} == expected


@needs_tar
@pytest.mark.parametrize("version", [None, "0.0", "0.1", "1.0"])
def test_sparse_files_stay_bytes(tmp_path, version):
    for name in ("a", "z"):
        (tmp_path / name).write_bytes(b"plain " + name.encode())
    with (tmp_path / "holes").open("wb") as f:
        for i in range(60):
            f.seek(i << 16)
            f.write(b"x" * 4096)
    options = ["--format=gnu"] if version is None else ["--format=pax", f"--sparse-version={version}"]
    raw = tar(tmp_path, "--sparse", *options)
    if len(raw) > 1 << 20:
        pytest.skip("this file system keeps no holes")
    assert sorted(raw[f.begin : f.end] for f in look(raw).files) == [b"plain a", b"plain z"]
    assert_holds_what_tarfile_reads(raw)


def test_what_is_no_tar_file():
    text = b"1234567 " * 64
    for raw in (b"", b"ustar", bytes(511), bytes(10240), archive()[:511], text, b"x" * 512, header(magic=b"tar is not so")):
        assert look(raw) is None


LIES = {
    "sum": header()[:148] + b"0000001\0" + header()[156:] + DATA,
    "sum that is no number": header()[:148] + b"12x\0    " + header()[156:] + DATA,
    "no sum": header()[:148] + bytes(8) + header()[156:] + DATA,
    "size beyond the file": header(size=b"00000001001\0") + DATA,
    "octal size": header(size=b"777777777777") + DATA,
    "size that is no number": header(size=b"9") + DATA,
    "negative size": header(size=b"\xff" * 12) + DATA,
    "binary size": header(size=b"\x80" + b"\xff" * 11) + DATA,
    "size of 2**63": header(size=b"\x80\0\0\0\x80" + bytes(7)) + DATA,
    "size with a flag": header(size=b"\x81" + bytes(11)),
    "size of a long name": header(size=b"77777777777", kind=b"L") + DATA,
    "long name that is too long": header(size=b"%011o\0" % 1_000_001, kind=b"L") + bytes(1_000_448),
    "a second header that is none": header() + DATA + b"x" * 512,
    "half a header": header() + DATA + header()[:400],
    "sparse map without end": SPARSE,
    "sparse map with half an end": SPARSE + bytes(504),
    "half a header of a sparse file": header() + DATA + header(kind=b"S")[:400],
    "pax size": pax(b"13 size=99999\n"[:12] + b"\n") + header() + DATA,
    "pax size that is no number": pax(b"10 size=-3\n"[:10] + b"\n") + header() + DATA,
    "pax size of many digits": pax(b"5009 size=" + b"1" * 4998 + b"\n") + header() + DATA,
    "pax record without end": pax(b"99 path=abc\n") + header() + DATA,
    "pax record without newline": pax(b"11 path=abcd") + header() + DATA,
    "pax record without key": pax(b"8 abcde\n") + header() + DATA,
    "pax record of no bytes": pax(b"0 path=a\n") + header() + DATA,
    "pax record of few bytes": pax(b"2 path=a\n") + header() + DATA,
    "pax record of many digits": pax(b"1" * 5000 + b" path=a\n") + header() + DATA,
    "pax records that are none": pax(b"path=a\n") + header() + DATA,
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie):
    assert len(look(header() + DATA).files) == 1
    with pytest.raises(ContainerError):
        look(LIES[lie])


def test_the_map_of_a_sparse_file_goes_on():
    assert SPARSE[482] == 1
    raw = SPARSE + bytes(504) + b"\1" + bytes(7) + bytes(512) + DATA + header() + DATA
    assert_holds_what_tarfile_reads(raw)
    assert len(look(raw).files) == 1


def test_there_is_a_bound_of_files_and_of_their_names(monkeypatch):
    raw = archive({f"{i:04}": b"1" for i in range(20)})
    monkeypatch.setattr(tar_files, "MAX_FILES", 5)
    found = look(raw)
    assert len(found.files) == 5
    assert found.warnings == ["only the first 5 files are looked into: there are too many"]
    monkeypatch.setattr(tar_files, "MAX_NAMES", 11)
    assert len(look(raw).files) == 2


def test_many_headers_without_files():
    """Long names, pax headers and sparse maps in long chains are walked through, not recursed into."""
    long_name = header(size=b"3", kind=b"L") + DATA
    raw = (long_name + pax(b"11 path=ab\n") + pax(b"11 path=ab\n", kind=b"g")) * 2000 + header() + DATA
    assert [f.name for f in look(raw).files] == ["ab"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere(form):
    raw = archive(FILES if form == "ustar" else FILES | LONG, FORMATS[form])
    files = look(raw).files
    for n in range(len(raw)):
        try:
            found = look(raw[:n])
        except ContainerError:
            assert 512 <= n < files[-1].end + 512
            continue
        if found is None:
            assert n < 512
        else:
            assert n % 512 == 0 or n > files[-1].end
            assert found.files == files[: len(found.files)]


@pytest.mark.parametrize("form", FORMATS)
def test_flipped_bytes(form):
    raw = archive({"a": b"1", "ü" * 45: b"22", PREFIXED: b"3"}, FORMATS[form])[:-8192]
    dice = random.Random(3)
    fates = {"found": 0, "refused": 0}
    for _ in range(3000):
        damaged = bytearray(raw)
        for _ in range(dice.choice((1, 1, 2, 8))):
            damaged[dice.randrange(len(raw))] = dice.choice((0, 255, ord("7"), dice.randrange(256)))
        if dice.random() < 0.8:  # with right sums the rest of the headers is read
            for at in range(0, len(damaged), 512):
                if any(damaged[at + 257 : at + 262]):
                    total = sum(damaged[at : at + 148] + damaged[at + 156 : at + 512]) + 256
                    damaged[at + 148 : at + 156] = b"%06o\0 " % total
        try:
            fates["found"] += look(bytes(damaged)) is not None
        except ContainerError:
            fates["refused"] += 1
    assert min(fates.values()) > 200
