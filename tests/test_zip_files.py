"""zip files, written by zipfile, numpy and Info-ZIP: stored entries are where `find` says, and no damage escapes it."""

import io
import random
import shutil
import struct
import subprocess
import time
import zipfile

import numpy as np
import pytest
from forge import reader

from tzip.formats import npy, zip_files
from tzip.formats.containers import ContainerError, Contents

RNG = np.random.default_rng(6)
FILES = {"a.bin": RNG.bytes(100), "folder/b.bin": b"text " * 40, "leer": b"", "größe/ü€.bin": RNG.bytes(7), "é.bin": b"1"}


def archive(files=FILES, method=zipfile.ZIP_STORED, comment=b"", **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as z:
        for name, data in files.items():
            with z.open(zipped(name, method), "w", **options) as f:
                f.write(data)
        z.comment = comment
    return file.getvalue()


def zipped(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = method
    return info


def look(raw: bytes) -> Contents | None:
    found = zip_files.find(reader(raw), len(raw))
    free = 0
    for inner in found.files if found else ():
        assert free <= inner.begin <= inner.end <= len(raw)
        assert inner.name.encode() is not None
        free = inner.end
    return found


def assert_holds_what_zipfile_reads(raw: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        infos = [i for i in z.infolist() if not i.is_dir()]
        expected = [(i.filename, z.read(i)) for i in infos if i.compress_type == zipfile.ZIP_STORED]
        found = look(raw)
        assert [(f.name, raw[f.begin : f.end]) for f in found.files] == expected
        records = zip_files.entries(reader(raw), len(raw))
        assert [(r.name, r.method, r.end - r.begin) for r in records] == [
            (i.filename, i.compress_type, i.compress_size) for i in infos
        ]
    assert (found.container, found.regions, found.tensors, found.warnings) == ("zip", [], [], [])


class Pipe(io.BytesIO):
    """A file that cannot seek: sizes follow the data."""

    def seek(self, *args):
        raise OSError

    def tell(self):
        raise OSError


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"x" * 65535], ids=len)
@pytest.mark.parametrize("zip64", [False, True])
def test_what_zipfile_writes(method, comment, zip64):
    raw = archive(FILES, method, comment, force_zip64=zip64)
    assert_holds_what_zipfile_reads(raw)
    assert len(look(raw).files) == (len(FILES) if method == zipfile.ZIP_STORED else 0)


def test_a_comment_that_looks_like_the_end():
    """zipfile does not read these; Info-ZIP does."""
    for comment in (b"PK\5\6" * 9, b"PK\5\6" + bytes(30)):
        assert look(archive(comment=comment)) == look(archive())


def test_an_empty_archive():
    assert look(archive({})) == Contents("zip")
    assert look(archive({}, comment=b"nothing")) == Contents("zip")


def test_methods_mixed_with_folders_and_extra_fields():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.mkdir("folder") if hasattr(z, "mkdir") else z.writestr("folder/", b"")
        for i, (name, data) in enumerate(FILES.items()):
            info = zipped(name, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
            info.extra = struct.pack("<HH5s", 0x7777, 5, b"extra") * i
            info.comment = b"comment" * i
            z.writestr(info, data)
        z.writestr("../../etc/passwd", b"a name is only a name")
        z.writestr("/absolute", b"likewise")
    assert_holds_what_zipfile_reads(file.getvalue())
    assert len(look(file.getvalue()).files) == 5


def test_sizes_that_follow_the_data():
    file = Pipe()
    with zipfile.ZipFile(file, "w") as z:
        for name, data in FILES.items():
            z.writestr(name, data)
    raw = file.getvalue()
    assert raw[6] & 8
    assert raw[18:26] == bytes(8)
    assert_holds_what_zipfile_reads(raw)


def test_more_entries_than_the_old_record_counts():
    raw = archive({str(i): b"%d" % i for i in range(66000)})
    assert b"PK\6\6" in raw[-200:]
    assert_holds_what_zipfile_reads(raw)


def test_more_entries_than_a_writer_without_zip64_counts():
    raw = archive({str(i): b"" for i in range(66000)})
    end64 = raw.rindex(b"PK\6\6")
    fields = struct.unpack("<4Q", raw[end64 + 24 : end64 + 56])
    old = raw[:end64] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 66000 - 65536, 66000 - 65536, *fields[2:], 0)
    assert_holds_what_zipfile_reads(old)


def test_a_directory_in_another_order_than_the_entries():
    raw = archive({"a": b"1", "b": b"22"})
    at = directory(raw)
    swapped = raw[:at] + raw[at + 47 : at + 94] + raw[at : at + 47] + raw[at + 94 :]
    assert zipfile.ZipFile(io.BytesIO(swapped)).namelist() == ["b", "a"]
    assert look(swapped) == look(raw)


def test_offsets_beyond_four_gigabytes():
    """The file is sparse: only the pages that zipfile writes are kept."""

    class Sparse(io.RawIOBase):
        def __init__(self):
            self.at, self.pieces = 0, {}

        def writable(self):
            return True

        def write(self, data):
            if len(data) < len(zeros):
                self.pieces[self.at] = bytes(data)
            self.at += len(data)
            return len(data)

        def read_at(self, at, n):
            out = bytearray(max(0, min(n, self.at - at)))
            for start, piece in self.pieces.items():
                for i in range(max(at, start), min(at + len(out), start + len(piece))):
                    out[i - at] = piece[i - start]
            return bytes(out)

    zeros = bytes(1 << 24)
    file = Sparse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "crc32", lambda data, crc=0: 0)
        with zipfile.ZipFile(file, "w") as z:
            with z.open("big", "w", force_zip64=True) as f:
                for _ in range(257):
                    f.write(zeros)
            z.writestr("after", b"data")
    big, after = zip_files.find(file.read_at, file.at).files
    assert (big.name, big.end - big.begin) == ("big", 257 << 24)
    assert (after.name, file.read_at(after.begin, after.end - after.begin)) == ("after", b"data")


def test_files_of_numpy():
    arrays = {"w": RNG.standard_normal((3, 4)).astype("<f4"), "größe": np.arange(5), "f": np.asfortranarray(RNG.random((2, 3)))}
    file = io.BytesIO()
    np.savez(file, **arrays)
    raw = file.getvalue()
    assert_holds_what_zipfile_reads(raw)
    files = look(raw).files
    assert [f.name for f in files] == [f"{name}.npy" for name in arrays]
    for inner, array in zip(files, arrays.values(), strict=True):
        part = raw[inner.begin : inner.end]
        region = npy.find(reader(part), len(part)).regions[0]
        assert part[region.begin : region.end] == array.tobytes("A")
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    assert look(packed.getvalue()) == Contents("zip")


@pytest.mark.skipif(shutil.which("zip") is None, reason="there is no zip command here")
@pytest.mark.parametrize("options", [["-0"], ["-9"], ["-0", "-fz"], ["-0", "-z"], ["-0", "-X", "-D"]])
def test_what_info_zip_writes(tmp_path, options):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    subprocess.run(["zip", "-q", "-r", *options, "../x.zip", "."], cwd=tmp_path, check=True, input=b"a comment\n.\n")
    raw = (tmp_path.parent / "x.zip").read_bytes()
    (tmp_path.parent / "x.zip").unlink()
    assert_holds_what_zipfile_reads(raw)
    assert len(look(raw).files) >= 2


@pytest.mark.skipif(shutil.which("zip") is None, reason="there is no zip command here")
def test_what_info_zip_encrypts_or_streams(tmp_path):
    (tmp_path / "a.bin").write_bytes(FILES["a.bin"])
    subprocess.run(["zip", "-q", "-0", "-P", "secret", "x.zip", "a.bin"], cwd=tmp_path, check=True)
    raw = (tmp_path / "x.zip").read_bytes()
    assert look(raw) == Contents("zip")
    assert [e.method for e in zip_files.entries(reader(raw), len(raw))] == [zip_files.ENCRYPTED]
    streamed = subprocess.run(["zip", "-q", "-0", "-", "a.bin"], cwd=tmp_path, check=True, capture_output=True).stdout
    assert_holds_what_zipfile_reads(streamed)


def test_an_archive_behind_other_bytes_whose_offsets_do_not_count_them():
    """As when two archives are joined: the second one's directory is read, as zipfile does."""
    for options in ({}, {"force_zip64": True}):
        assert_holds_what_zipfile_reads(archive({"other": b"1"}) + archive(FILES, **options))


def test_bytes_after_the_archive():
    raw = archive() + b"padding"
    assert len(look(raw).files) == len(FILES)
    assert_holds_what_zipfile_reads(raw)


def test_names_that_are_no_utf_8():
    raw = archive({"ü€.bin": b"1"})
    damaged = raw.replace("ü€".encode(), b"\xff\xfe\xfd\xfc\xfb")
    assert [f.name for f in look(damaged).files] == ["�" * 5 + ".bin"]
    old = archive({"abc": b"1"}).replace(b"abc", b"\x81\x80\0")
    assert [f.name for f in look(old).files] == ["üÇ"]


def test_what_is_no_zip_file():
    for raw in (b"", b"P", b"PK\3", b"PK\7\10PK\3\4", bytes(100), b"MZ" + archive()):
        assert look(raw) is None


def patched(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def directory(raw: bytes) -> int:
    return struct.unpack("<L", raw[-6:-2])[0]


TWO = archive({"a": b"1", "b": b"22"})
ONE = archive({"a": b"12345678"})
LIES = {
    "stored size": patched(ONE, directory(ONE) + 20, b"\7"),
    "both sizes": patched(ONE, directory(ONE) + 20, b"\x09\0\0\0\x09\0\0\0"),
    "size of 2**32 - 2": patched(ONE, directory(ONE) + 20, b"\xfe\xff\xff\xff" * 2),
    "size in a field that is not there": patched(ONE, directory(ONE) + 20, b"\xff\xff\xff\xff" * 2),
    "offset": patched(ONE, directory(ONE) + 42, b"\1"),
    "offset far away": patched(ONE, directory(ONE) + 42, b"\0\0\0\x7f"),
    "name": patched(ONE, directory(ONE) + 46, b"b"),
    "local name": patched(ONE, 30, b"b"),
    "length of the local name": patched(ONE, 26, b"\2"),
    "local extra": patched(ONE, 28, b"\xff\xff"),
    "length of the name": patched(ONE, directory(ONE) + 28, b"\xff"),
    "length of the comment": patched(ONE, directory(ONE) + 32, b"\xff"),
    "mark of the directory": patched(ONE, directory(ONE), b"QK"),
    "entries": patched(ONE, len(ONE) - 12, b"\2"),
    "size of the directory": patched(ONE, len(ONE) - 10, b"\x2d"),
    "size beyond the file": patched(ONE, len(ONE) - 10, b"\xff\xff\xff\xff"),
    "offset of the directory": patched(ONE, len(ONE) - 6, b"\xff\xff\xff\xff"),
    "disk": patched(ONE, len(ONE) - 18, b"\1"),
    "half an entry": ONE[:-22] + b"PK\1\2" + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, 51, directory(ONE), 0),
    "mark of an entry": TWO.replace(b"PK\3\4", b"QK\3\4").replace(b"QK", b"PK", 1),
    "no end": ONE[:-22],
    "a locator of nothing": ONE[:-22] + struct.pack("<4sLQL", b"PK\6\7", 0, 1 << 63, 1) + ONE[-22:],
}


@pytest.mark.parametrize("lie", LIES)
def test_directories_that_lie(lie):
    assert len(look(ONE).files) == 1
    with pytest.raises(ContainerError):
        look(LIES[lie])


def zip64(nbytes: int, offset: int, size: int, place: int) -> bytes:
    """An archive of one stored entry whose sizes stand in zip64 fields."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0x9AE0DAAF, 0xFFFFFFFF, 0xFFFFFFFF, 1, 0) + b"a" + b"12345678"
    field = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, offset)
    central = struct.pack("<4s6H3L", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0x9AE0DAAF, 0xFFFFFFFF, 0xFFFFFFFF)
    central += struct.pack("<5H2L", 1, 28, 0, 0, 0, 0, 0xFFFFFFFF) + b"a" + field
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size or len(central), place or len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local + central), 1)
    return local + central + end64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, *[0xFFFFFFFF] * 2, 0)


def test_zip64_sizes_that_lie():
    assert_holds_what_zipfile_reads(zip64(8, 0, 0, 0))
    for huge in (9, 1 << 31, 1 << 63, (1 << 64) - 1, (1 << 64) - 39):
        for fields in ((huge, 0, 0, 0), (8, huge, 0, 0), (8, 0, huge, 0), (8, 0, 0, huge)):
            with pytest.raises(ContainerError):
                look(zip64(*fields))


def test_the_zip64_record_is_found_behind_other_bytes_and_with_fields_of_later_versions():
    raw = zip64(8, 0, 0, 0)
    assert_holds_what_zipfile_reads(archive({"other": b"1"}) + raw)
    longer = raw[:-42] + b"later fields" + raw[-42:]
    assert look(longer) == look(raw)


def test_a_zip64_field_that_is_too_short():
    raw = zip64(8, 0, 0, 0)
    with pytest.raises(ContainerError, match="zip64 field"):
        look(raw.replace(struct.pack("<2H", 1, 24), struct.pack("<2H", 1, 16)))


def test_entries_that_overlap():
    """Both entries of the directory are believed to lie at the first one's place, or the second inside the first's data."""
    inside = archive({"a": b"1"})[: 30 + 1 + 1]
    raw = archive({"b": inside, "a": b"1"})
    second = directory(raw) + 46 + 1
    assert struct.unpack("<L", raw[second + 42 : second + 46])[0] > 0
    with pytest.raises(ContainerError, match="overlaps"):
        look(patched(raw, second + 42, struct.pack("<L", 31)))
    twice = archive({"a": b"1", "b": b"2"})
    with pytest.raises(ContainerError):
        look(patched(twice, directory(twice) + 47 + 42, bytes(4)))
    same = patched(patched(twice, directory(twice) + 47 + 42, bytes(4)), directory(twice) + 47 + 46, b"a")
    with pytest.raises(ContainerError, match="overlaps"):
        look(same)


def test_a_directory_that_is_too_large(monkeypatch):
    monkeypatch.setattr(zip_files, "MAX_DIRECTORY", 46)
    with pytest.raises(ContainerError, match="more than 46"):
        look(ONE)


def test_hostile_tails_take_no_time():
    started = time.monotonic()
    for tail in (b"PK\5\6" * 16384, b"PK\5\6" + bytes(18), b"PK\1\2" * 20000 + b"PK\5\6" + bytes(18)):
        with pytest.raises(ContainerError):
            look(b"PK\3\4" + bytes(30) + patched(tail, len(tail) - 10, struct.pack("<L", 99 + len(tail))))
    assert time.monotonic() - started < 5


def test_a_file_cut_anywhere():
    raw = archive(FILES, comment=b"a comment")
    for n in range(len(raw)):
        if n < 4:
            assert look(raw[:n]) is None
        elif n < len(raw) - 9:
            with pytest.raises(ContainerError):
                look(raw[:n])
        else:  # a comment cut short, as zipfile takes it
            assert look(raw[:n]) == look(raw)


@pytest.mark.parametrize("raw", [archive(FILES, force_zip64=True, comment=b"PK"), zip64(8, 0, 0, 0)], ids=["usual", "zip64"])
def test_flipped_bytes(raw):
    dice = random.Random(2)
    fates = {"found": 0, "refused": 0}
    for _ in range(4000):
        damaged = bytearray(raw)
        for _ in range(dice.choice((1, 1, 2, 8))):
            damaged[dice.randrange(len(raw))] = dice.choice((0, 255, dice.randrange(256)))
        try:
            fates["found"] += look(bytes(damaged)) is not None
        except ContainerError:
            fates["refused"] += 1
    assert min(fates.values()) > 200
