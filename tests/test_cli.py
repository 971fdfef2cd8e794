"""The command: exit codes, what goes to stdout and stderr, JSON, help, and each verb once for real."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forge
import numpy as np
import pytest
from click.testing import CliRunner, Result
from forge import noise, safetensors_bytes, weights

import tzip
from tzip.cli import cli

VERBS = (
    "pack", "unpack", "ls", "info", "verify", "recover", "cat", "repack", "diff", "inspect", "bench", "hook", "run", "warm-up",
    "completion",
)  # fmt: skip
links = pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")


def run(*args: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin, prog_name="tzip")


def ok(*args: str | Path, stdin: bytes | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def process(*args: str | Path, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "tzip.cli", *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        **options,
    )


def fails(code: int, *args: str | Path, stdin: bytes | None = None) -> str:
    """Return stderr of a call that must fail with that exit code, in one line, and print nothing to stdout."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    if code != 2:
        assert result.stderr.startswith("tzip: ")
    assert "Traceback" not in result.stderr
    return result.stderr


TENSORS = [
    ("w", "BF16", [100, 30], weights(3000)),
    ("f", "F32", [5], weights(5, 1, "F32")),
    ("s", "I64", [], (7).to_bytes(8, "little")),
    ("six", "F6_E2M3", [4], b"abc"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, {"format": "pt"}))
    return path


@pytest.fixture
def archive(model: Path) -> Path:
    ok("pack", model)
    return model.with_name("m.safetensors.tzip")


# ---------------------------------------------------------------- the frame


def test_version() -> None:
    assert ok("--version").stdout == f"tzip, version {tzip.__version__}\n"
    done = process("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split() == f"tzip, version {tzip.__version__}".encode().split()


def test_help() -> None:
    for flag in ("--help", "-h"):
        text = ok(flag).stdout
        assert "tzip pack model.safetensors" in text
        assert "Exit codes" in text
    for verb in VERBS:
        assert verb in text
        help_of = ok(verb, "--help").stdout
        assert help_of.startswith(f"Usage: tzip {verb}")
    for verb in ("pack", "unpack", "completion"):
        assert f"tzip {verb} " in " ".join(ok(verb, "--help").stdout.split("\n", 1)[1].split())


def test_wrong_use() -> None:
    for args in (
        ("nothing",),
        ("pack",),
        ("unpack",),
        ("ls",),
        ("cat", "x"),
        ("verify",),
        ("recover", "x"),
        ("repack", "x"),
        ("completion", "x"),
        ("pack", "x", "--level", "none"),
        ("pack", "x", "-t", "0"),
        ("pack", "x", "--wrong"),
        ("completion",),
    ):
        assert "Usage" in fails(2, *args)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    text = ok("completion", shell).stdout
    assert "_TZIP_COMPLETE" in text
    assert "tzip" in text


def test_completion_completes() -> None:
    env = {**os.environ, "_TZIP_COMPLETE": "bash_complete", "COMP_WORDS": "tzip re", "COMP_CWORD": "1"}
    out = process(env=env).stdout.decode()
    assert "recover" in out
    assert "repack" in out
    assert "verify" not in out


def test_errors_have_their_exit_codes(tmp_path: Path, archive: Path) -> None:
    data = archive.read_bytes()
    bad = {
        3: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
        4: data[:-9],
        5: forge.header(data, version=3) + data[64:],
        7: b"no archive at all" * 20,
    }
    for code, content in bad.items():
        path = tmp_path / f"bad{code}.tzip"
        path.write_bytes(content)
        for args in (
            ("ls", path),
            ("ls", "--json", path),
            ("info", path),
            ("verify", path),
            ("verify", "--deep", path),
            ("unpack", path, "-o", tmp_path / "o"),
            ("cat", path, "w", "-o", tmp_path / "x.npy"),
            ("repack", path, "-o", tmp_path / "r.tzip"),
            ("unpack", path, "-o", "-"),
        ):
            message = fails(code, *args)
            assert path.name in message, args
        assert not (tmp_path / "o").exists()
        assert not (tmp_path / "x.npy").exists()
        assert not (tmp_path / "r.tzip").exists()
    fails(6, "ls", tmp_path / "missing")
    fails(6, "pack", tmp_path / "missing")
    fails(6, "unpack", tmp_path / "missing")
    fails(6, "pack", archive, "-o", tmp_path / "no folder" / "x.tzip")
    fails(2, "cat", archive, "missing", "-o", tmp_path / "x")
    fails(2, "unpack", archive, "missing", "-o", tmp_path / "x")
    fails(2, "pack", tmp_path / "m.safetensors")  # the output exists
    fails(2, "pack", archive, tmp_path / "m.safetensors")  # where to?
    fails(7, "recover", tmp_path / "bad7.tzip", "-o", tmp_path / "rec")
    fails(5, "recover", tmp_path / "bad5.tzip", "-o", tmp_path / "rec")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="permissions are those of POSIX")
def test_unreadable_file(tmp_path: Path, model: Path) -> None:
    model.chmod(0)
    code = (
        "import difflib, os, sys, tzip.cli, tzip.measure, tzip.packing\n"
        "if os.geteuid() == 0:\n    os.setgid(65534); os.setuid(65534)\n"
        "try:\n    open(sys.argv[1], 'rb'); sys.exit(99)\nexcept PermissionError:\n    pass\n"
        "sys.argv = ['tzip', 'pack', sys.argv[1], '-o', '-']\n"
        "tzip.cli.main()"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest", "test")):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, timeout=60, check=False)
    if done.returncode == 99 or b"ModuleNotFoundError" in done.stderr or b"PermissionError" in done.stderr:
        pytest.skip("this user can read everything, or another one cannot run Python here")
    assert done.returncode == 6, done.stderr
    assert len(done.stdout) <= 64  # nothing but the header was on its way
    assert done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------- pack and unpack


def test_pack_and_unpack(tmp_path: Path, model: Path) -> None:
    result = ok("pack", model)
    assert result.stdout == ""
    assert "m.safetensors.tzip" in result.stderr
    assert "%" in result.stderr
    result = ok("unpack", f"{model}.tzip", "-o", tmp_path / "out")
    assert result.stdout == ""
    assert "1 members" in result.stderr
    assert (tmp_path / "out" / model.name).read_bytes() == model.read_bytes()
    assert "exists" in fails(2, "unpack", f"{model}.tzip", "-o", tmp_path / "out")
    ok("unpack", f"{model}.tzip", "-o", tmp_path / "out", "--force")
    assert "1 were there" in ok("unpack", f"{model}.tzip", "-o", tmp_path / "out", "--resume").stderr


def test_quiet(tmp_path: Path, model: Path) -> None:
    for args in (
        ("pack", model),
        ("unpack", f"{model}.tzip", "-o", tmp_path / "o"),
        ("verify", f"{model}.tzip"),
        ("repack", f"{model}.tzip", "-o", tmp_path / "r.tzip"),
    ):
        result = ok(*args, "-q")
        assert (result.stdout, result.stderr) == ("", "")


def test_json(tmp_path: Path, model: Path) -> None:
    packed = json.loads(ok("pack", model, "--json").stdout)
    assert packed["bytes_in"] == model.stat().st_size
    assert packed["bytes_out"] == os.path.getsize(packed["archive"])
    assert packed["members"][0]["name"] == model.name
    archive = packed["archive"]
    unpacked = json.loads(ok("unpack", archive, "-o", tmp_path / "o", "--json").stdout)
    assert unpacked["members"] == [model.name]
    listed = json.loads(ok("ls", archive, "--json").stdout)
    assert [t["name"] for t in listed["tensors"]] == [t[0] for t in TENSORS]
    assert [t["dtype"] for t in listed["tensors"]] == [t[1] for t in TENSORS]
    assert [t["shape"] for t in listed["tensors"]] == [t[2] for t in TENSORS]
    assert listed["members"][0]["sha256"] == packed["members"][0]["sha256"]
    assert json.loads(ok("ls", "-m", archive, "--json").stdout)["tensors"] == []
    info = json.loads(ok("info", archive, "--json").stdout)
    assert info["archive_id"] == packed["archive_id"]
    assert (info["members"], info["tensors"], info["archive_bytes"]) == (1, 4, packed["bytes_out"])
    assert sum(b["blocks"] for b in info["blocks"]) > 0
    verified = json.loads(ok("verify", "--deep", archive, "--json").stdout)
    assert verified[archive]["deep"] is True
    again = json.loads(ok("repack", archive, "-o", tmp_path / "r.tzip", "--level", "best", "--json").stdout)
    assert again["members"] == packed["members"]
    assert json.loads(ok("recover", archive, "-o", tmp_path / "rec", "--json").stdout)["whole"] == [model.name]
    each = json.loads(ok("pack", model, archive, "--each", "-o", tmp_path / "each", "--json").stdout)
    assert [Path(r["archive"]).name for r in each] == ["m.safetensors.tzip", "m.safetensors.tzip.tzip"]


def test_each(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    for name in ("a.bin", "sub/b.bin"):
        (root / name).write_bytes(noise(5000))
    ok("pack", root, "--each")
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*.tzip")) == ["a.bin.tzip", "sub/b.bin.tzip"]
    for path in list(root.rglob("*.tzip")):
        path.unlink()
    ok("pack", root, "--each", "-o", tmp_path / "out")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.tzip"))
    assert found == ["d/a.bin.tzip", "d/sub/b.bin.tzip"]
    ok("unpack", tmp_path / "out" / found[1], "-o", tmp_path / "x")
    assert (tmp_path / "x" / "b.bin").read_bytes() == noise(5000)


def test_patterns_that_the_shell_left_alone(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "c.txt", "[x].safetensors"):
        (tmp_path / name).write_bytes(safetensors_bytes([(name, "U8", [1], b"x")]))
    ok("pack", tmp_path / "?.safetensors", "-o", tmp_path / "ab.tzip")
    with tzip.open(tmp_path / "ab.tzip") as opened:
        assert [m.name for m in opened.members()] == ["a.safetensors", "b.safetensors"]
    ok("pack", tmp_path / "[x].safetensors", "-o", tmp_path / "x.tzip")
    with tzip.open(tmp_path / "x.tzip") as opened:
        assert [m.name for m in opened.members()] == ["[x].safetensors"]
    fails(6, "pack", tmp_path / "*.none", "-o", tmp_path / "n.tzip")
    ok("verify", tmp_path / "*.tzip")


def test_stdin_and_stdout(tmp_path: Path, model: Path) -> None:
    data = model.read_bytes()
    packed = process("pack", "-", "--name", "m.safetensors", stdin=data)
    assert packed.returncode == 0
    assert b"stdout" in packed.stderr
    assert packed.stdout == process("pack", "-", "--name", "m.safetensors", "-q", stdin=data).stdout
    with tzip.open(packed.stdout) as opened:
        assert opened.members()[0].name == "m.safetensors"
        assert opened["f"].tobytes() == TENSORS[1][3]
    out = process("unpack", "-", "-o", "-", stdin=packed.stdout)
    assert (out.returncode, out.stdout) == (0, data)
    assert process("unpack", "-", "-o", tmp_path / "o", stdin=packed.stdout).returncode == 0
    assert (tmp_path / "o" / model.name).read_bytes() == data
    assert process("verify", "-", "--deep", stdin=packed.stdout).returncode == 0
    assert process("pack", model, "-o", "-", "-q").stdout[:8] == packed.stdout[:8]
    assert process("pack", "-", "-o", tmp_path / "s.tzip", stdin=data).returncode == 0
    assert tzip.open(io.BytesIO((tmp_path / "s.tzip").read_bytes())).members()[0].name == "data"
    fails(2, "pack", "-", model, "-o", tmp_path / "t.tzip", stdin=b"x")
    fails(2, "pack", "-", "--name", "../x", "-o", tmp_path / "t.tzip", stdin=b"x")
    assert not (tmp_path / "t.tzip").exists()


def test_json_and_data_do_not_mix(model: Path) -> None:
    done = process("pack", model, "-o", "-", "--json")
    assert tzip.verify(done.stdout).members == 1


def test_unpack_some_members(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "ab", "sub/c", "sub/d"):
        (root / name).write_bytes(name.encode())
    ok("pack", root)
    ok("unpack", f"{root}.tzip", "d/a", "-o", tmp_path / "1")
    assert [p.name for p in (tmp_path / "1").rglob("*") if p.is_file()] == ["a"]
    ok("unpack", f"{root}.tzip", "d/sub/", "-o", tmp_path / "2")
    assert sorted(p.name for p in (tmp_path / "2").rglob("*") if p.is_file()) == ["c", "d"]
    out = process("unpack", f"{root}.tzip", "d/sub/d", "-o", "-")
    assert out.stdout == b"sub/d"
    fails(2, "unpack", f"{root}.tzip", "-o", "-")


def test_strict_and_warnings(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"broken")
    assert "safetensors" in fails(2, "pack", path, "--strict")
    done = process("pack", path)
    assert done.returncode == 0
    assert done.stderr.startswith(b"tzip: warning: ")
    ok("unpack", f"{path}.tzip", "-o", tmp_path / "o")
    assert (tmp_path / "o" / "m.safetensors").read_bytes() == b"broken"


def test_options_of_pack(tmp_path: Path, model: Path) -> None:
    for level in ("fast", "default", "best"):
        ok("pack", model, "-o", tmp_path / f"{level}.tzip", "--level", level, "-t", "2", "--verify", "file")
        ok("verify", "--deep", tmp_path / f"{level}.tzip")
    ok("pack", model, "-o", tmp_path / "n.tzip", "--no-sha256")
    assert "no SHA-256" in ok("verify", tmp_path / "n.tzip").stderr
    ok("pack", model, "-o", tmp_path / "res.tzip", "--resume")
    assert (tmp_path / "res.tzip").read_bytes() == (tmp_path / "default.tzip").read_bytes()


@links
def test_dereference(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (tmp_path / "outside").write_bytes(b"x")
    (root / "l").symlink_to("../outside")
    assert "-L" in fails(2, "pack", root)
    ok("pack", root, "-L")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "b").write_bytes(b"y")
    (snapshot / "l").symlink_to("../../blobs/b")
    ok("pack", snapshot, "-o", tmp_path / "s.tzip")
    ok("unpack", tmp_path / "s.tzip", "-o", tmp_path / "o")
    assert (tmp_path / "o" / "abc" / "l").read_bytes() == b"y"


# ---------------------------------------------------------------- the other verbs


def test_ls(archive: Path) -> None:
    lines = ok("ls", archive).stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("file")
    assert "100x30" in lines[1]
    assert "BF16" in lines[1]
    assert "scalar" in lines[3]
    assert "1 members" in lines[-1]
    assert len(ok("ls", "-m", archive).stdout.splitlines()) == 2


def test_ls_does_not_import_numba(archive: Path) -> None:
    code = (
        "import sys\nfrom tzip.cli import cli\n"
        "try:\n    cli(['ls', sys.argv[1]])\nexcept SystemExit as e:\n    assert not e.code\n"
        "print('HEAVY', sorted({m.split('.')[0] for m in sys.modules} & {'numba', 'llvmlite', 'ml_dtypes', 'torch'}))"
    )
    for verb in ("ls",):
        out = subprocess.run([sys.executable, "-c", code, str(archive)], capture_output=True, text=True, check=True).stdout
        assert "m.safetensors" in out, verb
        assert "HEAVY []" in out


def test_info(archive: Path) -> None:
    text = ok("info", archive).stdout
    assert "archive_id" in text
    assert "bf16" in text
    assert tzip.__version__ in text


def test_verify(tmp_path: Path, archive: Path) -> None:
    result = ok("verify", archive)
    assert "stored bytes sound" in result.stdout
    assert "decoded and compared" in ok("verify", "--deep", archive).stdout
    data = archive.read_bytes()
    f = forge.Forged(data)
    i = f.chunks()[0]
    record = bytearray(f.records[i][1])
    record[40] ^= 1  # the decoded sum, with all checks of stored bytes right: only --deep can tell
    f.records[i][1] = forge.reseal(bytes(record))
    lie = tmp_path / "lie.tzip"
    lie.write_bytes(f.build())
    ok("verify", lie)
    fails(3, "verify", "--deep", lie)
    damaged = bytearray(data)
    damaged[len(data) // 3] ^= 1
    lie.write_bytes(bytes(damaged))
    assert "lie.tzip" in fails(3, "verify", lie)
    result = run("verify", archive, lie)
    assert result.exit_code == 3


def test_recover(tmp_path: Path, model: Path) -> None:
    (tmp_path / "x.bin").write_bytes(noise(5000))
    ok("pack", model, tmp_path / "x.bin", "-o", tmp_path / "a.tzip")
    data = (tmp_path / "a.tzip").read_bytes()
    damaged = tmp_path / "damaged.tzip"
    damaged.write_bytes(data[:-90])  # index lost
    result = ok("recover", damaged, "-o", tmp_path / "1")
    assert "whole  m.safetensors" in result.stdout
    assert "index is lost" in result.stderr
    assert (tmp_path / "1" / "m.safetensors").read_bytes() == model.read_bytes()
    assert (tmp_path / "1" / "x.bin").read_bytes() == noise(5000)
    with tzip.open(data) as opened:
        first = opened.reader.chunk_at(0, 0)[0]
        last = int(opened.reader.index["m_record"][1])
    hit = bytearray(data)
    hit[first + 200] ^= 1  # a chunk of w
    damaged.write_bytes(bytes(hit))
    result = run("recover", damaged, "-o", tmp_path / "2")
    assert result.exit_code == 3
    assert "part   m.safetensors: 3 tensors" in result.stdout
    assert "whole  x.bin" in result.stdout
    got = (tmp_path / "2" / "m.safetensors.recovered.safetensors").read_bytes()
    out = io.BytesIO()
    tzip.pack(got, out)
    with tzip.open(out.getvalue()) as opened:
        assert sorted(opened) == ["f", "s", "six"]
        for name, _, _, raw in TENSORS[1:]:
            assert opened.tensor(name).raw().tobytes() == raw
    damaged.write_bytes(data[: last + 300])  # tail cut
    result = run("recover", damaged, "-o", tmp_path / "3")
    assert (tmp_path / "3" / "m.safetensors").read_bytes() == model.read_bytes()
    assert not (tmp_path / "3" / "x.bin").exists()
    damaged.write_bytes(data[last - 20 :])  # front cut
    run("recover", damaged, "-o", tmp_path / "4")
    assert (tmp_path / "4" / "x.bin").read_bytes() == noise(5000)
    assert not (tmp_path / "4" / "m.safetensors").exists()
    assert "exists" in run("recover", damaged, "-o", tmp_path / "4").output


def test_cat(tmp_path: Path, archive: Path) -> None:
    ok("cat", archive, "f", "-o", tmp_path / "f.npy")
    got = np.load(tmp_path / "f.npy")
    assert (got.dtype, got.shape, got.tobytes()) == (np.float32, (5,), TENSORS[1][3])
    ok("cat", archive, "s", "-o", tmp_path / "s.npy")
    assert np.load(tmp_path / "s.npy").shape == ()
    done = process("cat", archive, "f", "-o", "-")
    assert np.load(io.BytesIO(done.stdout)).tobytes() == TENSORS[1][3]
    done = process("cat", archive, "w", "--raw", "-o", "-")
    assert done.stdout == TENSORS[0][3]
    for name in ("w", "six"):
        assert "--raw" in fails(2, "cat", archive, name, "-o", tmp_path / "w.npy")
        assert not (tmp_path / "w.npy").exists()
    ok("cat", archive, "six", "--raw", "-o", tmp_path / "six")
    assert (tmp_path / "six").read_bytes() == b"abc"
    fails(2, "cat", archive, "f", "-o", tmp_path / "f.npy")
    ok("cat", archive, "f", "-o", tmp_path / "f.npy", "-f")
    ok("cat", archive, "f", "-m", "m.safetensors", "-o", tmp_path / "g.npy")
    fails(2, "cat", archive, "f", "-m", "other", "-o", tmp_path / "h.npy")


def test_repack(tmp_path: Path, archive: Path) -> None:
    ok("repack", archive, "-o", tmp_path / "r.tzip", "--level", "fast")
    with tzip.open(archive) as a, tzip.open(tmp_path / "r.tzip") as b:
        assert [m.sha256 for m in a.members()] == [m.sha256 for m in b.members()]
    fails(2, "repack", archive, "-o", tmp_path / "r.tzip")
    ok("repack", archive, "-o", tmp_path / "r.tzip", "-f")
    assert (tmp_path / "r.tzip").read_bytes() == archive.read_bytes()
    fails(2, "repack", archive, "-o", archive)


def test_bench(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes([("w", "BF16", [200_000], weights(200_000))]))
    text = ok("bench", path, "--repeat", "1", "-q").stdout
    for level in ("fast", "default", "best"):
        assert level in text
    figures = json.loads(ok("bench", path, "--repeat", "1", "--json").stdout)
    assert [f["level"] for f in figures] == ["fast", "default", "best", "max"]
    assert all(0 < f["bytes_out"] < f["bytes_in"] for f in figures)
    (tmp_path / "empty").write_bytes(b"")
    fails(2, "bench", tmp_path / "empty")


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE and no closed pipes of this kind")
def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(noise(3 << 20))
    ok("pack", path)
    child = subprocess.Popen(
        [sys.executable, "-m", "tzip.cli", "unpack", f"{path}.tzip", "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 6
    assert b"Traceback" not in errors


def test_inspect_writes_a_page(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(safetensors_bytes([("layer.0.w", "BF16", [50, 40], weights(2000))]))
    page = tmp_path / "page.html"
    ok("inspect", model, "--html", page)
    text = page.read_text(encoding="utf-8")
    assert "layer.0.w" in text
    assert "model.safetensors" in text
    assert ok("inspect", model, "--html", "-", "-q").stdout == text
    assert run("inspect", model, "--html", page).exit_code == 2
    ok("inspect", model, "--html", page, "--force")
    assert run("inspect", tmp_path / "none", "--html", tmp_path / "other").exit_code == 6
    assert not (tmp_path / "other").exists()
    ok("pack", model)
    ok("inspect", tmp_path / "model.safetensors.tzip", "--html", page, "-f")
