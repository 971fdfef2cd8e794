"""Real trainings with Hugging Face's Trainer, and a loop with accelerate. Run by trainer_runs.py."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from stores import same
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tzip
from tzip.accelerate import load_state, save_state
from tzip.store.runs import Store
from tzip.transformers import StoreCallback, restore_checkpoint


class Losses(TrainerCallback):
    """Notes the loss of each step, and kills the process at one."""

    def __init__(self, kill_at: int | None) -> None:
        self.seen: dict[int, str] = {}
        self.kill_at = kill_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen[state.global_step] = logs["loss"].hex()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def bert(seed: int = 0, hidden: int = 32) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=500, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def data() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(500, (8,), generator=g), "labels": torch.randint(2, (), generator=g)} for _ in range(36)
    ]


def arguments(output: Path, steps: int = 20, **options: Any) -> TrainingArguments:
    given = {
        "max_steps": steps, "save_steps": 5, "logging_steps": 1, "per_device_train_batch_size": 4, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3, "dataloader_pin_memory": False, "save_total_limit": 2,
    }  # fmt: skip
    return TrainingArguments(str(output), **{**given, **options})


def fit(
    output: Path, steps: int, callbacks: list[Any], resume: str | None = None, kill_at: int | None = None, **options: Any
) -> tuple[dict[int, str], Any]:
    losses = Losses(kill_at)
    trainer = Trainer(
        bert(), arguments(output, steps, **options), train_dataset=data(), eval_dataset=data()[:4],
        callbacks=[*callbacks, losses],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return losses.seen, trainer


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(work: Any) -> None:
    """Do it in a process that kills itself."""
    child = os.fork()  # before torch has threads
    if child == 0:
        work()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def raises(kind: type[Exception], words: str, call: Any, *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except kind as e:
        if not re.search(words, str(e)):
            raise
    else:
        raise AssertionError(f"no {kind.__name__}: {words}")


def resumes_after_kills(folder: Path) -> None:
    """Killed between two saves, and while one is on its way: losses and weights are those of a run without, to the bit."""
    run, output = folder / "run", folder / "out"
    assert restore_checkpoint(run, output) is None
    killed(lambda: fit(output, 25, [StoreCallback(run, remove=True, threads=1)], kill_at=12))
    assert [p.name for p in output.iterdir()] == []
    assert restore_checkpoint(run, output, threads=1) == str(output / "checkpoint-10")

    def hang() -> None:
        write = Store.save_files
        Store.save_files = lambda self, step, *a, **k: write(self, step, *a, **k) if step != 20 else time.sleep(60)
        saver = StoreCallback(run, block=False, threads=1)
        fit(output, 25, [saver], str(output / "checkpoint-10"), kill_at=22)

    killed(hang)
    assert [e.step for e in Store(run, create=False).log()] == [15, 10, 5]
    assert (output / "tzip-saving-20").is_dir()
    shutil.rmtree(output / "checkpoint-15")  # whatever the folders are
    os.remove(output / "checkpoint-20" / "optimizer.pt")

    plain, reference = fit(folder / "plain", 25, [])
    resume = restore_checkpoint(run, output, threads=1)
    assert resume == str(output / "checkpoint-15")
    losses, trainer = fit(output, 25, [StoreCallback(run, block=False, threads=1)], resume)
    assert losses == {step: plain[step] for step in range(16, 26)}
    same(dict(reference.model.state_dict()), dict(trainer.model.state_dict()))
    assert not (output / "tzip-saving-20").exists()
    # Every folder is in the store, byte for byte, the ones that the Trainer has deleted, too.
    with Store(run, create=False, threads=1) as store:
        assert [e.step for e in store.log()] == [25, 20, 15, 10, 5]
        assert not store.verify(deep=True).faults
        assert store.find("best", metric="loss").metrics["loss"] == min(float.fromhex(losses.get(s, plain[s])) for s in
                                                                         (5, 10, 15, 20, 25))  # fmt: skip
        assert sorted(p.name for p in output.iterdir()) == ["checkpoint-20", "checkpoint-25"]
        for step in (20, 25):
            store.restore(step, folder / f"again-{step}")
            assert files(folder / f"again-{step}") == files(output / f"checkpoint-{step}")
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
            files(folder / "again-25")
        )
        sizes = {e.step: e.stored / e.raw for e in store.log()}
        assert sizes[25] < 0.9 * sizes[5], sizes  # differences, although checkpoint-5 to -15 are gone


def restores_with_care(folder: Path) -> None:
    """A folder that a kill has left is completed; one that is something else is left alone."""
    run, output = folder / "run", folder / "out2"
    at = Path(restore_checkpoint(run, output, 25, threads=1) or "")
    whole = files(at)
    assert whole == files(folder / "out" / "checkpoint-25")
    os.remove(at / "model.safetensors")
    assert restore_checkpoint(run, output, 25, threads=1) == str(at)
    assert files(at) == whole
    (at / "notes.txt").write_text("mine")
    raises(tzip.UsageError, "another one than step 25", restore_checkpoint, run, output, 25)
    os.remove(at / "notes.txt")
    (at / "model.safetensors").write_bytes(b"newer")
    raises(tzip.UsageError, "another one than step 25", restore_checkpoint, run, output)
    assert (at / "model.safetensors").read_bytes() == b"newer"
    restore_checkpoint(run, output, force=True, threads=1)
    assert files(at) == whole
    assert [p.name for p in output.iterdir()] == ["checkpoint-25"]
    raises(tzip.UsageError, "no checkpoint 7", restore_checkpoint, run, output, 7)
    with Store(folder / "states", threads=1) as store:
        store.save(1, {"a": 1})
    raises(tzip.UsageError, "holds no files", restore_checkpoint, folder / "states", output)


def keeps_the_best(folder: Path) -> None:
    """With load_best_model_at_end the best folder stays until the end; the rest goes."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss"}
    output = folder / "best"
    _, trainer = fit(output, 20, [StoreCallback(folder / "best-run", remove=True, block=False, threads=1)], **best)
    chosen = f"checkpoint-{trainer.state.best_global_step}"
    assert [p.name for p in output.iterdir()] == [chosen]
    with Store(folder / "best-run", create=False) as store:
        assert [e.step for e in store.log()] == [20, 15, 10, 5]
        assert store.find("best", metric="eval_loss").step == trainer.state.best_global_step
    raises(
        tzip.UsageError, "hub_strategy", StoreCallback("x", remove=True).on_train_begin,
        arguments(output, push_to_hub=True, hub_strategy="checkpoint"), trainer.state, None,
    )  # fmt: skip
    raises(tzip.UsageError, "no such folder", StoreCallback("x").on_save, arguments(folder / "none"), trainer.state, None)


def shards_may_be_cut_anew(folder: Path) -> None:
    """A model in shards: the next folder has another number of them, with other names, and is a difference all the same."""
    model = bert(3, 64)
    with Store(folder / "shards", threads=1) as store:
        model.save_pretrained(folder / "one", max_shard_size="60KB")
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        model.save_pretrained(folder / "two", max_shard_size="100KB")
        os.rename(folder / "two" / "config.json", folder / "two" / "renamed.json")
        first, second = (store.save_files(i, [folder / name]) for i, name in enumerate(("one", "two")))
        shards = [{n for n in files(folder / name) if n.endswith("safetensors")} for name in ("one", "two")]
        assert len(shards[0]) > len(shards[1]) > 1
        assert not shards[0] & shards[1]
        assert second.stored < 0.75 * first.stored, (first, second)
        for i, name in enumerate(("one", "two")):
            store.restore(i, folder / f"{name}-again")
            assert files(folder / f"{name}-again") == files(folder / name)


def accelerates(folder: Path) -> None:
    """A loop of one's own, left and taken up again: model, optimizer, scheduler, loader, random state, an object."""

    class Counted:
        n = 0

        def state_dict(self) -> dict[str, int]:
            return {"n": self.n}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.n = state["n"]

    def start() -> Any:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        counted = Counted()
        accelerator.register_for_checkpointing(counted)
        accelerator.project_configuration.automatic_checkpoint_naming = True  # is left aside
        return accelerator, *accelerator.prepare(net, optimizer, schedule), counted

    def train(parts: Any, steps: int) -> list[str]:
        accelerator, net, optimizer, schedule, counted = parts
        losses = []
        for _ in range(steps):
            x = torch.randn(4, 8)
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            counted.n += 1
            losses.append(loss.item().hex())
        return losses

    run = folder / "accelerated"
    parts = start()
    train(parts, 3)
    report = save_state(parts[0], run, 3, metrics={"loss": 1.0}, tags="mine", threads=1)
    assert report is not None
    assert report.raw > 2000
    train(parts, 2)
    save_state(parts[0], run, 5, threads=1)
    rest = train(parts, 4)
    parts = start()
    assert load_state(parts[0], run, "mine", threads=1) == 3
    assert parts[-1].n == 3
    assert load_state(parts[0], run, threads=1) == 5
    assert parts[-1].n == 5
    assert train(parts, 4) == rest
    raises(tzip.UsageError, "is there already", save_state, parts[0], run, 5)
    raises(tzip.UsageError, "no tag", load_state, parts[0], run, "none")
    raises(tzip.UsageError, "holds no files", load_state, parts[0], folder / "states")
    assert parts[0].project_configuration.automatic_checkpoint_naming
    assert not list(folder.glob("*.saving")) + list(folder.glob("*.loading"))


def readme(path: Path, folder: Path) -> None:
    """The README's examples."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ran = [b for b in blocks if re.search(r"tzip\.(accelerate|transformers)\b", b)]
    assert {m for b in ran for m in re.findall(r"tzip\.(\w+)", b)} >= {"accelerate", "transformers"}
    folder.mkdir()
    os.chdir(folder)
    space: dict[str, Any] = {"model": bert(), "data": data(), "accelerator": Accelerator(cpu=True)}
    for block in ran:
        exec(compile(block, "README.md", "exec"), space)
    assert space["step"] == 100
    assert [e.step for e in Store("runs/trainer", create=False).log()] == [20, 10]


def main(text: Path, folder: Path) -> None:
    resumes_after_kills(folder)
    restores_with_care(folder)
    keeps_the_best(folder)
    shards_may_be_cut_anew(folder)
    accelerates(folder)
    readme(text, folder / "readme")
