"""Packing a hub: whatever is killed, doubled or repeated, every model comes back and nothing is done twice."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hubs import contents, die_at_one, weights, write_hub, write_model

import tzip
from tzip.cli import cli
from tzip.coders.errors import ChangedError, CorruptError, UsageError
from tzip.formats.atomic import PartialFile
from tzip.hub import bulk
from tzip.hub.bulk import Job, hub_report, pack_hub, pack_model, unpack_model
from tzip.hub.engines import Failure, LocalEngine, engine_named
from tzip.hub.models import find_models
from tzip.hub.receipts import Receipt, Shelf

HERE = "local=1"  # in this process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A hub, and what it was packed into once; nobody changes them."""
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder / "hub")
    return folder, pack_hub(folder / "hub", folder / "out", engine=HERE)


@pytest.fixture
def packed(made, tmp_path):
    """The same, of one's own."""
    folder, report = made
    shutil.copytree(folder / "hub", tmp_path / "hub")
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path, report


def restored_from(out, receipt, target, **options):
    tzip.unpack(out / "archives" / f"{receipt.archive}.tzip", target, **options)
    return target / Path(receipt.model).name


def same_tree(a, b):
    if a.is_file():
        assert a.read_bytes() == b.read_bytes()
        assert a.stat().st_mtime_ns == b.stat().st_mtime_ns
    else:
        assert contents(a) == contents(b)
        assert contents(a)


# ---- what comes out


def test_every_model_comes_back_from_its_archive_and_those_beside_it(made, tmp_path):
    folder, report = made
    assert [r.model for r in report.receipts] == ["README.md", "fam/plain", "fam/tuned", "other", "sharded"]
    assert report.packed == 5
    assert not report.failures
    assert not report.left
    for i, receipt in enumerate(report.receipts):
        same_tree(folder / "hub" / receipt.model, restored_from(folder / "out", receipt, tmp_path / str(i)))


def test_fine_tunes_lean_on_their_base_and_are_small(made):
    receipts = {r.model: r for r in made[1].receipts}
    base = receipts["fam/plain"]
    assert {r.model: (r.base, r.base_model, r.depth) for r in receipts.values() if r.base} == {
        "fam/tuned": (base.archive, "fam/plain", 1),
        "sharded": (base.archive, "fam/plain", 1),
    }
    assert receipts["fam/tuned"].bytes_out < 0.8 * base.bytes_out


def test_receipts_say_what_went_in_and_what_came_out(made):
    folder, report = made
    for receipt in report.receipts:
        told = json.loads((folder / "out" / "receipts" / f"{receipt.key}.json").read_text())
        assert (told["model"], told["level"], told["tzip_receipt"]) == (receipt.model, "default", 1)
        archive = folder / "out" / "archives" / f"{told['archive']}.tzip"
        assert archive.stat().st_size == told["bytes_out"]
        with tzip.open(archive) as opened:
            assert opened.reader.footer.archive_id.hex() == told["archive"]
        files = [i for i in told["inputs"] if i["sha256"] is not None]
        assert sum(i["size"] for i in files) == told["bytes_in"]
        assert files
        for one in files:
            path = (folder / "hub" / receipt.model).parent / one["path"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == one["sha256"]
            assert path.stat().st_mtime_ns == one["mtime_ns"]
    assert report.bytes_in == sum(p.stat().st_size for p in (folder / "hub").rglob("*") if p.is_file())
    assert report.bytes_out == sum(p.stat().st_size for p in (folder / "out" / "archives").iterdir())
    assert hub_report(folder / "out").receipts == report.receipts


def test_a_base_that_lies_elsewhere_is_found_with_base_and_no_other_one_is_taken(packed):
    folder, report = packed
    receipts = {r.model: r for r in report.receipts}
    base = folder / "out" / "archives" / f"{receipts['fam/plain'].archive}.tzip"
    (folder / "cold").mkdir()
    base.rename(folder / "cold" / "renamed.tzip")
    with pytest.raises(tzip.BaseNotFoundError):
        restored_from(folder / "out", receipts["fam/tuned"], folder / "no")
    shutil.copy(folder / "out" / "archives" / f"{receipts['other'].archive}.tzip", base)  # the same names and shapes
    with pytest.raises(tzip.BaseNotFoundError):
        restored_from(folder / "out", receipts["fam/tuned"], folder / "no")
    assert not list((folder / "no").rglob("*.safetensors"))
    there = restored_from(folder / "out", receipts["fam/tuned"], folder / "yes", base=folder / "cold")
    same_tree(folder / "hub" / "fam" / "tuned", there)


# ---- again


def test_a_call_again_changes_nothing_and_starts_nothing(packed, monkeypatch):
    folder, report = packed
    before = contents(folder / "out")
    monkeypatch.setattr(bulk, "engine_named", None)
    again = pack_hub(folder / "hub", folder / "out", engine="ray")
    assert again.packed == 0
    assert again.receipts == report.receipts
    assert contents(folder / "out") == before


def test_new_models_lean_on_what_is_packed_already(packed):
    folder, report = packed
    before = contents(folder / "out")
    write_model(folder / "hub" / "a-new-one", weights(1, 1e-4, 7))
    again = pack_hub(folder / "hub", folder / "out", engine=HERE)
    assert again.packed == 1
    base = next(r for r in report.receipts if r.model == "fam/plain")
    assert again.receipts[1].base == base.archive
    after = contents(folder / "out")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2


def test_a_changed_model_is_packed_anew_beside_its_old_self(packed):
    folder, report = packed
    target = folder / "hub" / "other" / "config.json"
    target.write_text("changed")
    os.utime(target, ns=(2**61, 2**61))
    again = pack_hub(folder / "hub", folder / "out", engine=HERE)
    assert again.packed == 1
    assert len(list((folder / "out" / "receipts").iterdir())) == 6
    assert hub_report(folder / "out").receipts == again.receipts != report.receipts
    unpack_model(folder / "out", "other", folder / "back")
    assert (folder / "back" / "other" / "config.json").read_text() == "changed"


@pytest.mark.parametrize("harm", ["gone", "short", "no receipt", "broken receipt"])
def test_what_was_lost_is_made_again_the_same(packed, harm):
    folder, report = packed
    before = {name: data for name, (data, _) in contents(folder / "out" / "archives").items()}
    receipt = next(r for r in report.receipts if r.model == "fam/plain")
    archive, told = (folder / "out" / p for p in (f"archives/{receipt.archive}.tzip", f"receipts/{receipt.key}.json"))
    if harm == "gone":
        archive.unlink()
    elif harm == "short":
        archive.write_bytes(archive.read_bytes()[:-1])
    elif harm == "no receipt":
        told.unlink()
    else:
        told.write_bytes(b"[]")
    again = pack_hub(folder / "hub", folder / "out", engine=HERE)
    assert not again.failures
    assert again.packed >= 1
    assert {r.model for r in again.receipts} == {r.model for r in report.receipts}
    after = {name: data for name, (data, _) in contents(folder / "out" / "archives").items()}
    assert before.items() <= after.items()
    for i, one in enumerate(again.receipts):
        same_tree(folder / "hub" / one.model, restored_from(folder / "out", one, folder / str(i)))


# ---- killed, doubled


def job_of(folder, name, **options):
    model = next(m for m in find_models(folder / "hub", "default", None)[0] if m.name == name)
    return Job(model, str(folder / "out2"), "default", 1, None, **options)


@pytest.mark.parametrize("at", ["_write", "publish_archive", "publish_receipt"])
def test_a_task_that_dies_anywhere_and_runs_again(packed, monkeypatch, at):
    """What a kill leaves: the work file, or the archive without a receipt."""
    folder, report = packed
    Shelf(folder / "out2").make()
    job = job_of(folder, "other")

    class KilledError(BaseException):
        pass

    def die(*arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "close", lambda self: self.file.close())  # nobody cleans up
        patch.setattr(*((bulk, at) if at == "_write" else (Shelf, at)), die)
        with pytest.raises(KilledError):
            pack_model(job)
    left = contents(folder / "out2")
    assert len(left) == 1
    assert next(iter(left)).startswith("archives/" if at == "publish_receipt" else "work/")
    receipt = pack_model(job)
    assert receipt.archive == next(r.archive for r in report.receipts if r.model == "other")
    after = contents(folder / "out2")
    assert sorted(after) == [f"archives/{receipt.archive}.tzip", f"receipts/{receipt.key}.json"]
    if at == "publish_receipt":
        assert left.items() <= after.items()
    assert pack_model(job) == receipt
    assert contents(folder / "out2") == after


def test_the_same_task_many_times_at_once(packed):
    folder, _ = packed
    Shelf(folder / "out2").make()
    job = job_of(folder, "other")
    results = []
    barrier = threading.Barrier(4)

    def run():
        barrier.wait()
        results.append(pack_model(job))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({(r.archive, r.seconds) for r in results}) == 1  # all are the one that was written
    names = sorted(contents(folder / "out2"))
    assert names == [f"archives/{results[0].archive}.tzip", f"receipts/{job.model.key}.json"]


def test_a_task_that_was_overtaken_and_swept_returns_what_there_is(packed, monkeypatch):
    folder, _ = packed
    Shelf(folder / "out2").make()
    job = job_of(folder, "other")
    write = bulk._write

    def overtaken(items, file, options):
        report = write(items, file, options)
        monkeypatch.setattr(bulk, "_write", write)
        first.append(pack_model(job))
        (folder / "out2" / "archives" / f"{report.archive_id}.tzip").rename(folder / "aside")  # so that it has to be published
        return report

    def find(self, key):
        found = real(self, key)
        return found or (first[0] if first else None)

    first: list[Receipt] = []
    real = Shelf.find
    monkeypatch.setattr(Shelf, "find", find)
    monkeypatch.setattr(bulk, "_write", overtaken)
    assert pack_model(job) == first[0]
    assert not list((folder / "out2" / "work").iterdir())


@pytest.mark.parametrize("kind", ["archives", "receipts"])
def test_a_task_that_is_overtaken_while_it_gives_a_file_its_name(packed, monkeypatch, kind):
    """The other one sweeps this one's file from under it."""
    folder, _ = packed
    Shelf(folder / "out2").make()
    job = job_of(folder, "other")
    publish = PartialFile.publish
    first = []

    def overtaken(self):
        if self.target.parent.name == kind and not first:
            first.append(None)
            first.append(pack_model(job))
            if kind == "archives":  # it is there by now, unless
                self.target.unlink()
        publish(self)

    monkeypatch.setattr(PartialFile, "publish", overtaken)
    if kind == "archives":
        monkeypatch.setattr(Shelf, "find", lambda self, key, find=Shelf.find: find(self, key) or (first[1:] or [None])[0])
    assert pack_model(job) == first[1]
    assert not list((folder / "out2" / "work").iterdir())


@pytest.mark.parametrize("engine", ["local=2", "ray=2", "dask=2"])
def test_an_engine_whose_worker_is_killed_in_the_middle(packed, engine):
    """Real processes; the archives are those of a run without engine or death, so nothing was half done or done otherwise."""
    folder, report = packed
    marker = folder / "marker"
    script = Path(__file__).with_name("hub_cluster.py")
    call = [sys.executable, str(script), engine, str(folder / "hub"), str(folder / "out2"), str(marker)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert marker.exists()
    assert told["failures"] == {}
    assert told["packed"] == 5
    assert told["archives"] == {r.model: r.archive for r in report.receipts}
    archives = contents(folder / "out" / "archives")
    assert {n: d for n, (d, _) in contents(folder / "out2" / "archives").items()} == {n: d for n, (d, _) in archives.items()}
    assert not list((folder / "out2" / "work").iterdir())
    before = contents(folder / "out2")
    assert pack_hub(folder / "hub", folder / "out2", engine=engine).packed == 0
    assert contents(folder / "out2") == before


# ---- errors of one model


def test_errors_of_one_model_stop_no_other(packed, monkeypatch):
    """A base that fails, too: what was to lean on it is packed by itself."""
    folder, _ = packed
    write = bulk._write

    def fail(items, file, options):
        if items[0].name == "plain":
            raise OSError(5, "the disk is tired")
        return write(items, file, options)

    monkeypatch.setattr(bulk, "_write", fail)
    report = pack_hub(folder / "hub", folder / "out2", engine=HERE)
    assert list(report.failures) == ["fam/plain"]
    assert "the disk is tired" in report.failures["fam/plain"].message
    assert [(r.model, r.base) for r in report.receipts] == [(m, "") for m in ("README.md", "fam/tuned", "other", "sharded")]
    assert not list((folder / "out2" / "work").iterdir())
    monkeypatch.setattr(bulk, "_write", write)
    assert pack_hub(folder / "hub", folder / "out2", engine=HERE).packed == 1


def test_a_model_that_changed_after_the_plan_is_refused(packed):
    folder, _ = packed
    Shelf(folder / "out2").make()
    job = job_of(folder, "other")
    (folder / "hub" / "other" / "more.txt").write_text("more")
    with pytest.raises(ChangedError):
        pack_model(job)
    assert not contents(folder / "out2")


def test_what_cannot_be_a_model_is_named(tmp_path):
    write_model(tmp_path / "hub" / "good", weights(1))
    write_model(tmp_path / "hub" / "bad", weights(2))
    os.symlink("/etc/hostname", tmp_path / "hub" / "bad" / "link")
    os.symlink(tmp_path / "hub" / "good", tmp_path / "hub" / "again")
    (tmp_path / "hub" / "empty").mkdir()
    models, left = find_models(tmp_path / "hub", "default", None)
    assert [m.name for m in models] == ["good"]
    assert sorted(Path(p).name for p in left) == ["again", "bad", "empty"]
    assert "-L" in left[str(tmp_path / "hub" / "bad")]
    models, left = find_models(tmp_path / "hub", "default", True)
    assert [m.name for m in models] == ["bad", "good"]
    with pytest.raises(UsageError):
        find_models(tmp_path / "hub" / "good" / "config.json", "default", None)


def test_snapshots_of_a_hub_cache_are_models(tmp_path):
    repo = tmp_path / "hub" / "models--org--name"
    write_model(tmp_path / "made", weights(1))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "blobs").mkdir()
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in (tmp_path / "made").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy2(file, repo / "blobs" / digest)
        os.symlink(f"../../blobs/{digest}", repo / "snapshots" / "abc" / file.name)
    report = pack_hub(tmp_path / "hub", tmp_path / "out", engine=HERE)
    (receipt,) = report.receipts
    assert receipt.model == "models--org--name/snapshots/abc"
    there = restored_from(tmp_path / "out", receipt, tmp_path / "back")
    assert {n: d for n, (d, _) in contents(there).items()} == {n: d for n, (d, _) in contents(tmp_path / "made").items()}


def test_the_output_may_lie_in_the_hub(packed, monkeypatch):
    folder, report = packed
    monkeypatch.chdir(folder)
    (folder / "out").rename(folder / "hub" / "packed")
    again = pack_hub("hub", "hub/packed", engine=HERE)
    assert (again.packed, again.receipts, again.left) == (0, report.receipts, {})
    with pytest.raises(UsageError):
        pack_hub("nowhere", "out2", engine=HERE)
    with pytest.raises(UsageError):
        pack_hub("hub", "hub/../hub", engine=HERE)
    assert not (folder / "out2").exists()
    assert not (folder / "hub" / "receipts").exists()


def test_copies_of_a_model_share_an_archive(tmp_path):
    write_model(tmp_path / "hub" / "a" / "x", weights(1))
    shutil.copytree(tmp_path / "hub" / "a", tmp_path / "hub" / "b")
    report = pack_hub(tmp_path / "hub", tmp_path / "out", engine=HERE, max_chain=0)
    assert len({r.archive for r in report.receipts}) == 1
    assert report.bytes_out == report.receipts[0].bytes_out
    assert pack_hub(tmp_path / "hub", tmp_path / "out", engine=HERE, max_chain=0).packed == 0
    assert len(hub_report(tmp_path / "out").receipts) == 2


def test_chains_are_no_longer_than_asked_for(packed):
    folder, _ = packed
    report = pack_hub(folder / "hub", folder / "out2", engine=HERE, max_chain=0)
    assert {r.depth for r in report.receipts} == {0}
    assert {r.base for r in report.receipts} == {""}
    with pytest.raises(UsageError):
        pack_hub(folder / "hub", folder / "out2", engine=HERE, max_chain=-1)


# ---- receipts as they come


def test_receipts_that_are_none_are_refused(packed):
    folder, report = packed
    receipt = report.receipts[1]
    path = folder / "out" / "receipts" / f"{receipt.key}.json"
    good = json.loads(path.read_text())
    assert Receipt.read(path.read_bytes(), "") == receipt
    bad = [good | {"tzip_receipt": 2}, good | {"more": 1}, good | {"archive": "../../etc"}, good | {"bytes_out": "1"}, [], 7]
    bad += [{k: v for k, v in good.items() if k != gone} for gone in ("archive", "inputs", "model", "tzip_receipt")]
    for told in bad:
        path.write_text(json.dumps(told))
        with pytest.raises(CorruptError):
            hub_report(folder / "out")
    path.write_bytes(b"\xff{")
    with pytest.raises(CorruptError):
        hub_report(folder / "out")
    path.write_text(json.dumps(good | {"base": "../x"}))
    with pytest.raises(CorruptError):
        hub_report(folder / "out")


def test_an_archive_that_is_gone_is_a_failure_in_the_report(packed):
    folder, report = packed
    (folder / "out" / "archives" / f"{report.receipts[1].archive}.tzip").unlink()
    again = hub_report(folder / "out")
    assert sorted(again.failures) == ["fam/plain", "fam/tuned", "sharded"]
    assert [r.model for r in again.receipts] == ["README.md", "other"]
    with pytest.raises(UsageError):
        hub_report(folder / "hub")


def test_dead_work_is_removed_when_it_is_old(packed):
    folder, _ = packed
    old, new = folder / "out" / "work" / "old.tzip-partial", folder / "out" / "work" / "new.tzip-partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    pack_hub(folder / "hub", folder / "out", engine=HERE)
    assert not old.exists()
    assert new.exists()


# ---- engines


def test_a_task_that_always_kills_its_process_is_a_failure_of_its_own():
    with engine_named("local=2") as engine:
        results = dict(engine.map(die_at_one, range(5), lambda item, _: [7] if item == 4 else []))
    assert {k: v for k, v in results.items() if k not in (1, 2)} == {0: 0, 3: 9, 4: 16, 7: 49}
    assert results[1].kind == "WorkerDied"
    assert results[2] == Failure("ValueError", "two", 6)


def test_engines_that_are_none_are_refused():
    for name in ("slurm", "", "local=x", "local=0", "ray=0"):
        with pytest.raises(UsageError), engine_named(name):
            pass


def test_an_engine_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tzip.hub.ray_engine", raising=False)
    with pytest.raises(UsageError, match=r"tensor-tzip\[ray\]"), engine_named("ray"):
        pass


def test_processes_share_the_machine_with_threads():
    with engine_named("local", threads=10_000) as engine:
        assert isinstance(engine, LocalEngine)
        assert engine.processes == 1


# ---- the command


def test_the_command(packed):
    folder, report = packed
    run = CliRunner().invoke
    hub, out, out2 = (str(folder / name) for name in ("hub", "out", "out2"))
    done = run(cli, ["hub", "pack", hub, "-o", out, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["packed"], told["bytes_out"]) == (0, report.bytes_out)
    assert [m["archive"] for m in told["models"]] == [r.archive for r in report.receipts]
    done = run(cli, ["pack", hub, "-o", out2, "--engine", HERE])
    assert done.exit_code == 0, done.output
    assert "5 models, 5 of them packed now" in done.stdout
    (folder / "text").mkdir()
    (folder / "text" / "words").write_text("words")
    done = run(cli, ["pack", str(folder / "text"), "-o", str(folder / "out4"), "--engine", HERE, "--level", "fast"])
    assert done.exit_code == 0, done.output
    assert {r.level for r in hub_report(folder / "out4").receipts} == {"fast"}
    done = run(cli, ["hub", "ls", out2])
    assert done.exit_code == 0
    assert "fam/tuned" in done.stdout
    done = run(cli, ["hub", "unpack", out2, "fam/tuned", "-o", str(folder / "back")])
    assert done.exit_code == 0, done.output
    same_tree(folder / "hub" / "fam" / "tuned", folder / "back" / "tuned")
    assert run(cli, ["hub", "unpack", out2, "nobody"]).exit_code == 2
    for wrong in (["--engine", "spark"], ["--engine", HERE, "--each"], ["--engine", HERE, "--base", hub]):
        assert run(cli, ["pack", hub, "-o", str(folder / "out3"), *wrong]).exit_code == 2
    assert run(cli, ["pack", hub, "--engine", HERE]).exit_code == 2


def test_the_command_ends_with_the_code_of_what_failed(packed, monkeypatch):
    folder, _ = packed

    def fail(items, file, options):
        raise ChangedError("it moved")

    monkeypatch.setattr(bulk, "_write", fail)
    done = CliRunner().invoke(cli, ["hub", "pack", str(folder / "hub"), "-o", str(folder / "out2"), "--engine", HERE])
    assert done.exit_code == ChangedError.exit_code
    assert "fam/plain: not packed: it moved" in done.stderr


def test_progress_ends_at_all(packed):
    folder, _ = packed
    told = []
    pack_hub(folder / "hub", folder / "out2", engine=HERE, progress=lambda done, of: told.append((done, of)))
    assert told[0] == (0, told[0][1])
    assert told[-1] == (told[0][1], told[0][1])
    assert sorted(told) == told


def test_bits_that_are_no_numbers_come_back(tmp_path):
    """NaN payloads and -0.0 in a fine-tune of a base that has them elsewhere."""
    base, tuned = weights(1), weights(1, 1e-4, 1)
    for tensors, bits in ((base, 0x7FC00001), (tuned, 0xFFA00123)):
        tensors["norm"].view(np.uint32)[3] = bits
        tensors["layers.0.w"].view(np.uint32)[5, 7] = 0x80000000
    write_model(tmp_path / "hub" / "a", base)
    write_model(tmp_path / "hub" / "b", tuned)
    report = pack_hub(tmp_path / "hub", tmp_path / "out", engine=HERE)
    assert replace(report.receipts[1], base="x").base_model == "a"
    for receipt in report.receipts:
        same_tree(tmp_path / "hub" / receipt.model, restored_from(tmp_path / "out", receipt, tmp_path / "back"))
