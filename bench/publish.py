"""Weights in motion: what publishing small updates costs, in bytes and in time.

    python bench/publish.py make RUN OUT --model training_run.py [--steps 50] [--lr 1e-6]
    python bench/publish.py sizes OUT [--level default]
    python bench/publish.py speed OUT [--repeat 5]

"make" goes on with the last checkpoint of a run (stepNNNNN.safetensors of training_run.py, which holds the model's code) as a
fine-tune at a learning rate of reinforcement learning: real gradients, float32 master weights and AdamW moments, the weights
published as bfloat16 after each step, into OUT as stepNN.safetensors.
"sizes" publishes them one after another and shows, for each step, the share of elements that changed, the bytes that the store
grew by, and those beside the entropy bound: the positions of the changed elements (order 0), and their differences (order 0,
given the exponent of the earlier value).
"speed" shows, for one core and by CPU time, best of the repeats: finding what changed and hashing it, coding it, and applying
it. `--csv OUT` writes a line for each figure.
"""

import argparse
import importlib.util
from pathlib import Path


def make(run: Path, out: Path, code: Path, steps: int, lr: float) -> None:
    """Write the weights after each of some steps of a fine-tune."""
    import glob
    import sysconfig

    import numpy as np
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file

    spec = importlib.util.spec_from_file_location("training_run", code)
    assert spec is not None
    assert spec.loader is not None
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    torch.manual_seed(2)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    state = load_file(max(run.glob("step*.safetensors")))
    dim = state["model.tok.weight"].shape[1]
    model = training.GPT(dim, sum(1 for k in state if k.startswith("model.blocks.") and k.endswith("norm1.weight")))
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for name, p in model.named_parameters():
        moments = {k: state[f"optim.{k}.{name}"].clone() for k in ("exp_avg", "exp_avg_sq")}
        opt.state[p] = {"step": torch.tensor(240.0), **moments}
    files = sorted(glob.glob(f"{sysconfig.get_paths()['stdlib']}/*.py"))
    data = torch.from_numpy(np.frombuffer(b"".join(Path(f).read_bytes() for f in files), np.uint8).astype(np.int64))
    batches = torch.Generator().manual_seed(3)

    def publish(step: int) -> None:
        save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, out / f"step{step:02d}.safetensors")

    publish(0)
    for step in range(1, steps + 1):
        at = torch.randint(len(data) - training.CONTEXT - 1, (training.BATCH,), generator=batches)
        x = torch.stack([data[i : i + training.CONTEXT] for i in at])
        y = torch.stack([data[i + 1 : i + training.CONTEXT + 1] for i in at])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        publish(step)
        print(f"step {step} loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "sizes", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--level", default="default")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.out, args.model, args.steps, args.lr)


if __name__ == "__main__":
    main()
