"""Real trainings with Lightning. Run by trainer_runs.py."""

import copy
import os
import re
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from stores import same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import tzip
from tzip.lightning import COPIES, STORE, StoreCheckpointIO
from tzip.store.runs import Store

EPOCH = 4  # steps; Lightning resumes data at the beginning of an epoch


class Model(pl.LightningModule):
    """Small, with what makes a resume go wrong: dropout, running statistics, a scheduler with a Counter."""

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 48), torch.nn.BatchNorm1d(48), torch.nn.Dropout(0.3), torch.nn.Linear(48, 1)
        )
        self.losses: dict[int, str] = {}
        self.kill_at = kill_at
        self.rng: torch.Tensor | None = None

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        loss = ((self.net(x) - y) ** 2).mean()
        self.losses[self.trainer.global_step] = loss.item().hex()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self.rng is not None:
            torch.set_rng_state(self.rng)


def data() -> Any:
    g = torch.Generator().manual_seed(1)
    pairs = torch.utils.data.TensorDataset(torch.randn(EPOCH * 8, 16, generator=g), torch.randn(EPOCH * 8, 1, generator=g))
    # A generator of its own: loaders draw a number for each epoch, before on_train_start when training is resumed.
    return torch.utils.data.DataLoader(pairs, batch_size=8, generator=torch.Generator())


def fit(folder: Path, steps: int, plugin: Any, ckpt_path: str | None = None, **options: Any) -> Model:
    torch.manual_seed(0)
    model = Model(options.pop("kill_at", None))
    keeping = {"save_top_k": 2, "monitor": "step", "mode": "max", "save_last": "link", **options}
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=EPOCH, **keeping)], plugins=[plugin] if plugin else None,
    )  # fmt: skip
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != STORE)


def killed(work: Any) -> None:
    """Do it in a process that kills itself."""
    child = os.fork()  # before torch has threads
    if child == 0:
        work()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def resumes_after_kills(folder: Path) -> None:
    """Killed between two saves, and while one is on its way: losses and weights are those of a run without, to the bit."""
    run = folder / "killed"
    killed(lambda: fit(run, 40, StoreCheckpointIO(threads=1), kill_at=18))
    assert names(run) == ["epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt", "last.ckpt"]

    def hang() -> None:
        write = Store._write
        Store._write = lambda self, save: write(self, save) if save.asked.step != 24 else time.sleep(60)
        fit(run, 40, StoreCheckpointIO(block=False, threads=1), "last", kill_at=26)

    killed(hang)
    assert os.readlink(run / "last.ckpt") == "epoch=5-step=24.ckpt"
    assert (run / "last.ckpt").exists()  # or Lightning would begin anew
    store = Store(run / STORE, create=False)
    assert not store.verify(deep=True).faults
    assert store.find().step == 20
    lost = run / "epoch=5-step=24.ckpt"
    raises(tzip.UsageError, "step 24 was not saved to its end", StoreCheckpointIO().load_checkpoint, lost)

    plain = fit(folder / "plain", 28, None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed = fit(run, 28, StoreCheckpointIO(block=False, threads=1), "last")
    assert any("did not end; step 20 is loaded instead" in str(w.message) for w in told)
    assert resumed.losses == {step: plain.losses[step] for step in range(20, 28)}
    same(dict(plain.state_dict()), dict(resumed.state_dict()))
    assert names(run) == ["epoch=5-step=24-v1.ckpt", "epoch=6-step=28.ckpt", "last.ckpt"]
    assert os.readlink(run / "last.ckpt") == "epoch=6-step=28.ckpt"


def raises(kind: type[Exception], words: str, call: Any, *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except kind as e:
        if not re.search(words, str(e)):
            raise
    else:
        raise AssertionError(f"no {kind.__name__}: {words}")


def same_checkpoints(folder: Path) -> None:
    """What is loaded is what Lightning saves, whichever way it is saved; and is restored as a file that Lightning loads."""
    fit(folder / "plain2", 12, None, save_last=True)
    for name, plugin in (
        ("blocking", StoreCheckpointIO(threads=1)),
        ("background", StoreCheckpointIO(block=False, threads=1)),
        ("wrapped", AsyncCheckpointIO(StoreCheckpointIO(threads=1))),
    ):
        run = folder / name
        fit(run, 12, plugin, save_last=True)
        expected_tags = {"epoch=1-step=8.ckpt": 8, "epoch=2-step=12.ckpt": 12, "last.ckpt": 12}
        store = Store(run / STORE, create=False)
        assert names(run) == sorted(store.tags())
        early = "epoch=0-step=4.ckpt"  # AsyncCheckpointIO may remove what it has not saved yet, and then saves it
        assert {n: s % COPIES for n, s in store.tags().items() if (name, n) != ("wrapped", early)} == expected_tags
        assert store.find(8).metrics == {"step": 8.0}
        assert names(folder / "plain2") == sorted(expected_tags)
        for ckpt in expected_tags:
            expected = torch.load(folder / "plain2" / ckpt, weights_only=True)
            found = StoreCheckpointIO().load_checkpoint(run / ckpt)
            if name != "wrapped":  # AsyncCheckpointIO's copy has none
                assert found["state_dict"]._metadata == expected["state_dict"]._metadata
            assert type(found["lr_schedulers"][0]["milestones"]) is Counter
            for state in (expected, found):  # they say where they are
                del state["callbacks"]
            same(expected, found)
    store.restore(8, folder / "again.ckpt")
    again = Model.load_from_checkpoint(folder / "again.ckpt")
    same(dict(again.state_dict()), dict(torch.load(folder / "plain2" / "epoch=1-step=8.ckpt")["state_dict"]))


def keeps_what_is_leant_on(folder: Path) -> None:
    """Checkpoints that Lightning removes are pruned and swept; those that stay load, whatever they were differences from."""
    run = folder / "kept"
    saver = StoreCheckpointIO(prune_after=3, grace=0.0, threads=1)
    g = torch.Generator().manual_seed(3)
    w = torch.randn(20_000, generator=g)
    states = {}
    for step in range(12):
        w = w + 1e-6 * torch.randn(20_000, generator=g)
        state = {"global_step": step, "state_dict": {"w": w.clone(), "still": torch.ones(5000)}}
        states[step] = copy.deepcopy(state)
        saver.save_checkpoint(state, run / f"{step}.ckpt")
        if step == 2:
            shutil.copy(run / "2.ckpt", run / "mine.ckpt")  # by hand; Lightning then removes its own
        if step >= 2 and step != 5:
            saver.remove_checkpoint(run / f"{step - 1 if step == 6 else step - 2}.ckpt")
    stay = {int(n.split(".")[0]) for n in names(run) if n != "mine.ckpt"}
    assert {3, 10, 11} <= stay, stay
    for step in stay:
        same(states[step], saver.load_checkpoint(run / f"{step}.ckpt"))
    same(states[2], saver.load_checkpoint(run / "mine.ckpt"))
    with Store(run / STORE, create=False) as store:
        there = {e.step for e in store.log()}
        assert stay | {2} <= there
        assert len(there) < 12
        assert not store.verify(deep=True).faults
        assert len(store.backend.object_ids()) < 12
    # What was saved under a name again is the last one; a process that dies before it marks it has saved it all the same.
    old = (run / "11.ckpt").read_bytes()
    shutil.copy(run / "11.ckpt", run / "copy.ckpt")
    states[11]["state_dict"]["w"] += 1
    saver.save_checkpoint(states[11], run / "11.ckpt")
    (run / "11.ckpt").write_bytes(old)
    same(states[11], saver.load_checkpoint(run / "11.ckpt"))
    raises(tzip.UsageError, "step 11 is not in the store any more", saver.load_checkpoint, run / "copy.ckpt")


def refuses(folder: Path) -> None:
    """Errors: what is not there, damaged or pickled; URLs; and what a thread has raised."""
    run = folder / "refused"
    saver = StoreCheckpointIO(block=False, threads=1)
    w = torch.arange(6.0)

    raises(FileNotFoundError, "none.ckpt", saver.load_checkpoint, run / "none.ckpt")
    raises(tzip.UsageError, "URL", saver.save_checkpoint, {}, "s3://bucket/a.ckpt")
    raises(tzip.UsageError, "storage_options", saver.save_checkpoint, {}, run / "a.ckpt", {"colour": 1})
    saver.save_checkpoint({"w": w, "o": {"deep": [Model]}}, run / "a.ckpt", {"note": "first", "tags": "mine"})
    raises(tzip.UsageError, "pickle holds o.deep.0.*weights_only=False", saver.load_checkpoint, run / "a.ckpt")
    assert saver.load_checkpoint(run / "a.ckpt", weights_only=False)["o"]["deep"] == [Model]
    saver.save_checkpoint({"w": w}, run / "latest")  # names that are no tags
    for where in ("cpu", torch.device("meta"), {"cpu": "meta"}, lambda s, at: s, lambda s, at: None):
        moved = saver.load_checkpoint(run / "latest", where)["w"]
        assert moved.device.type == ("meta" if "meta" in str(where) else "cpu")
    store = Store(run / STORE, create=False)
    assert [(e.step, e.note) for e in store.log()] == [(1, ""), (0, "first")]
    assert store.tags() == {"a.ckpt": 0, "mine": 0, "./latest": 1}
    data = (run / "a.ckpt").read_bytes()
    (run / "a.ckpt").write_bytes(data.replace(b'"step":0', b'"step":1'))
    raises(tzip.CorruptError, "SHA-256", saver.load_checkpoint, run / "a.ckpt")
    torch.save({"plain": w}, run / "b.ckpt")
    same({"plain": w}, saver.load_checkpoint(run / "b.ckpt"))
    shutil.copytree(run, folder / "elsewhere")  # moves as a whole
    same({"w": w}, saver.load_checkpoint(folder / "elsewhere" / "latest"))
    os.symlink("latest", run / "link.ckpt")
    saver.save_checkpoint({"w": w + 1}, run / "link.ckpt")  # replaces the link, not what it leads to
    same({"w": w}, saver.load_checkpoint(run / "latest"))
    saver.save_checkpoint({"w": w + 2}, run / "c.ckpt")
    saver.remove_checkpoint(run / "c.ckpt")  # may not have been written yet
    assert StoreCheckpointIO(block=False).__getstate__().keys() == {"block", "prune_after", "grace", "options"}
    saver.teardown()
    assert not (run / "c.ckpt").exists()
    assert "c.ckpt" not in store.tags()
    (run / "latest").write_bytes(data[:-5] + b"12345")
    saver.remove_checkpoint(run / "latest")  # a damaged marker, and a file of Lightning's own
    saver.remove_checkpoint(run / "b.ckpt")
    saver.wait()
    assert not (run / "latest").exists()
    assert not (run / "b.ckpt").exists()
    assert "./latest" not in store.tags()
    store.save(50, {})
    saver.save_checkpoint({"w": w + 3}, run / "d.ckpt")
    saver.load_checkpoint(run / "d.ckpt")
    (run / "e.ckpt").mkdir()
    saver.save_checkpoint({"w": w + 4}, run / "e.ckpt")
    raises(OSError, "e.ckpt", saver.teardown)
    same({"w": w + 3}, saver.load_checkpoint(run / "d.ckpt"))


def readme(path: Path, folder: Path) -> None:
    """The README's example."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ran = [b for b in blocks if "tzip.lightning" in b]
    assert ran
    folder.mkdir()
    os.chdir(folder)
    space: dict[str, Any] = {"tzip": tzip, "model": Model(), "data": data()}
    for words in ("Starting from v1.9.0, `tensorboardX`", ".*no last checkpoint available", ".*logging interval"):
        warnings.filterwarnings("ignore", message=words)  # what Lightning tells whoever leaves its defaults
    for block in ran:
        exec(compile(block, "README.md", "exec"), space)
    assert space["state"]["global_step"] == 20


def main(text: Path, folder: Path) -> None:
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    resumes_after_kills(folder)
    same_checkpoints(folder)
    keeps_what_is_leant_on(folder)
    refuses(folder)
    readme(text, folder / "readme")
