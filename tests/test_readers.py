"""Real readers of safetensors files: under the hook a packed folder gives the bits of the plain one, without it an error."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tzip
from tzip import hook
from tzip.coders.errors import CorruptError

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHARDS = "90KB"


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    left = hook.installed()
    hook.uninstall()
    assert not left


def bits(tensor: Any) -> tuple[Any, ...]:
    """Return element type, shape and bytes of a torch tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def all_bits(tensors: Any) -> dict[str, tuple[Any, ...]]:
    """Return the bits of a state dict, or of a module's."""
    if isinstance(tensors, torch.nn.Module):
        tensors = tensors.state_dict()
    return {name: bits(tensor) for name, tensor in tensors.items()}


def pack(folder: Path) -> Path:
    """Return a copy of a folder whose safetensors files are packed in place, but for shards too small to shrink."""
    copy = folder.with_name(folder.name + "-packed")
    shutil.copytree(folder, copy)
    report = tzip.pack_in_place([copy])
    assert len(report.changed) >= 1
    assert all(why == "would not become smaller" and Path(p).stat().st_size < 50_000 for p, why in report.left.items())
    assert len(report.changed) + len(report.left) == len(list(copy.rglob("*.safetensors")))
    return copy


def compare(plain: Path, packed: Path, read: Callable[[Path], Any]) -> tuple[Any, Any]:
    """Return what `read` makes of the plain folder without the hook, and of the packed one with it; without it, it refuses."""
    expected = read(plain)
    with pytest.raises((safetensors.SafetensorError, ValueError, OSError, RuntimeError)) as caught:
        read(packed)
    assert not isinstance(caught.value, FileNotFoundError)
    with tzip.install():
        found = read(packed)
        again = read(plain)
    assert_same(again, expected)
    assert_same(found, expected)
    return expected, found


def assert_same(found: Any, expected: Any) -> None:
    assert all_bits(found) == all_bits(expected)
    assert all_bits(expected)


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny model, of shards and an index, in a dtype, with tied weights or not."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    made: dict[tuple[str, bool, str], Path] = {}

    def make(dtype: str = "float32", tied: bool = False, shards: str = SHARDS) -> Path:
        key = (dtype, tied, shards)
        if key not in made:
            torch.manual_seed(len(made))
            config = transformers.LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, dtype=dtype,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
            made[key] = tmp_path_factory.mktemp("llama") / "model"
            model.save_pretrained(made[key], max_shard_size=shards)
        return made[key]

    return make


def logits(model: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        return bits(model.eval()(torch.arange(48).reshape(2, 24)).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"device_map": "cpu"}, {"disable_mmap": True}, {"dtype": "float32"}], ids=["", "map", "bytes", "cast"]
)
def test_from_pretrained(llama: Callable[..., Path], tmp_path: Path, dtype: str, tied: bool, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    if "device_map" in options:
        pytest.importorskip("accelerate")
    plain = llama(dtype, tied)
    assert len(list(plain.glob("*.safetensors"))) > 1
    shutil.copytree(plain, tmp_path / "model")
    packed = pack(tmp_path / "model")
    index = "model.safetensors.index.json"
    assert (packed / index).read_bytes() == (plain / index).read_bytes()
    one, other = compare(plain, packed, lambda p: transformers.AutoModelForCausalLM.from_pretrained(p, **options))
    assert logits(one) == logits(other)
    assert one.dtype == other.dtype == getattr(torch, options.get("dtype", dtype))
    shared = other.get_output_embeddings().weight.data_ptr() == other.get_input_embeddings().weight.data_ptr()
    assert shared == tied


def test_from_pretrained_of_one_file_and_saved_again(llama: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain = llama("bfloat16", False, "1GB")
    assert [p.name for p in plain.glob("*.safetensors")] == ["model.safetensors"]
    shutil.copytree(plain, tmp_path / "model")
    packed = pack(tmp_path / "model")
    _, found = compare(plain, packed, transformers.AutoModelForCausalLM.from_pretrained)
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    with tzip.install():  # over the file that it was loaded from
        transformers.AutoModelForCausalLM.from_pretrained(packed).save_pretrained(packed)
    assert (packed / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_shard_of_many_may_stay_plain(llama: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain = llama()
    shutil.copytree(plain, tmp_path / "model")
    packed = pack(tmp_path / "model")
    shard, *others = (p for p in sorted(packed.glob("*.safetensors")) if p.stat().st_size < (plain / p.name).stat().st_size)
    assert others
    shutil.copyfile(plain / shard.name, shard)
    compare(plain, packed, transformers.AutoModelForCausalLM.from_pretrained)


def test_a_damaged_shard_is_an_error(llama: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(llama(), tmp_path / "model")
    packed = pack(tmp_path / "model")
    shard = min(packed.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-len(data) // 2] ^= 4
    shard.write_bytes(data)
    for options in ({}, {"disable_mmap": True}):
        with tzip.install(), pytest.raises(CorruptError) as caught:
            transformers.AutoModelForCausalLM.from_pretrained(packed, **options)
        assert isinstance(caught.value, safetensors.SafetensorError)
        assert options or str(shard) in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_a_hub_cache(llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are folders of links to blobs, which are the files that are packed; nothing in it can be written afterwards."""
    transformers = pytest.importorskip("transformers")
    constants = pytest.importorskip("huggingface_hub.constants")
    plain = llama("bfloat16")
    cache = tmp_path / "hub"
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = cache / "models--who--what"
    snapshot = model / "snapshots" / revision
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    blobs = []
    for i, file in enumerate(sorted(plain.iterdir())):
        blob = model / "blobs" / f"{i:040x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        if file.suffix == ".safetensors":
            blobs.append(blob)
    left = tzip.pack_in_place([snapshot]).left
    assert len(left) == len(blobs)
    assert all("link" in reason for reason in left.values())
    assert len(tzip.pack_in_place(blobs).changed) >= 2
    assert all(p.is_symlink() for p in snapshot.iterdir())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folders = [p for p in (cache, *cache.rglob("*")) if p.is_dir()]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.chmod(0o555)
            stack.callback(folder.chmod, 0o755)
        before = sorted((str(p), p.lstat().st_mtime_ns) for p in cache.rglob("*"))
        compare(plain, snapshot, transformers.AutoModelForCausalLM.from_pretrained)
        with tzip.install():
            by_name = transformers.AutoModelForCausalLM.from_pretrained("who/what", cache_dir=cache, local_files_only=True)
        assert_same(by_name, transformers.AutoModelForCausalLM.from_pretrained(plain))
        assert sorted((str(p), p.lstat().st_mtime_ns) for p in cache.rglob("*")) == before


# ---------------------------------------------------------------- accelerate


@pytest.fixture
def model(llama: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return a sharded model, and the same one packed."""
    shutil.copytree(llama(), tmp_path / "model")
    return tmp_path / "model", pack(tmp_path / "model")


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}], ids=["none", "cpu", "disk"])
def test_accelerate_load_state_dict(model: tuple[Path, Path], device_map: dict[str, str] | None) -> None:
    modeling = pytest.importorskip("accelerate.utils.modeling")
    plain, packed = model

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            found |= modeling.load_state_dict(str(shard), device_map=device_map)
        return found

    compare(plain, packed, read)


def test_accelerate_dispatches_and_offloads(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are on disk stay in the packed files until they are needed."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # accelerate collects after each shard, which takes long in large processes
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    plain, packed = model
    config = transformers.AutoConfig.from_pretrained(plain)

    def read(folder: Path, device_map: dict[str, str]) -> Any:
        with accelerate.init_empty_weights():
            empty = transformers.AutoModelForCausalLM.from_config(config)
        return accelerate.load_checkpoint_and_dispatch(
            empty, str(folder), device_map=device_map, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
        )

    whole = {"": "cpu"}
    expected, found = compare(plain, packed, lambda folder: read(folder, whole))
    offloaded = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                 "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    expected = read(plain, offloaded)
    answer = logits(expected)
    with tzip.install():
        found = read(packed, offloaded)
        assert found.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        assert logits(found) == answer == logits(found)


def test_from_pretrained_offloads_to_packed_files(model: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    plain, packed = model
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip

    def read(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, offload_folder=str(tmp_path / f"offload-{folder.name}")
        )

    answer = logits(read(plain))
    with tzip.install():
        found = read(packed)
        assert found.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        assert logits(found) == answer


def test_accelerate_offloaded_weights_loader(model: tuple[Path, Path]) -> None:
    offload = pytest.importorskip("accelerate.utils.offload")
    plain, packed = model
    where = json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"]

    def read(folder: Path) -> dict[str, Any]:
        index = {name: {"safetensors_file": str(folder / file), "weight_name": name} for name, file in where.items()}
        loader = offload.OffloadedWeightsLoader(index=index, save_folder=str(folder))
        return {name: loader[name] for name in where}

    compare(plain, packed, read)


# ---------------------------------------------------------------- diffusers, peft


# diffusers 0.42 leaves the file open of which it reads the bytes.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"disable_mmap": True}], ids=["", "full", "bytes"])
def test_diffusers(tmp_path: Path, options: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    net.save_pretrained(tmp_path / "unet")
    packed = pack(tmp_path / "unet")
    one, other = compare(tmp_path / "unet", packed, lambda p: diffusers.UNet2DModel.from_pretrained(p, **options))
    sample = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert bits(one(sample, 3).sample) == bits(other(sample, 3).sample)


def test_diffusers_shards(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    net = diffusers.AutoencoderKL(block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, latent_channels=2)
    net.save_pretrained(tmp_path / "vae", max_shard_size="150KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    packed = pack(tmp_path / "vae")
    compare(tmp_path / "vae", packed, diffusers.AutoencoderKL.from_pretrained)


def test_peft_adapters(llama: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = llama()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    packed = pack(tmp_path / "lora")

    def read(folder: Path) -> Any:
        return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)

    one, other = compare(tmp_path / "lora", packed, read)
    assert any("lora_A" in name for name in all_bits(other))
    assert logits(one) == logits(other)
    assert logits(one) != logits(transformers.AutoModelForCausalLM.from_pretrained(base))


# ---------------------------------------------------------------- huggingface_hub, torch


def test_hub_state_dicts(model: tuple[Path, Path]) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def read(folder: Path) -> dict[str, Any]:
        return {
            name: tensor
            for shard in sorted(folder.glob("*.safetensors"))
            for name, tensor in hub.load_state_dict_from_file(shard).items()
        }

    compare(*model, read)


def test_hub_models(model: tuple[Path, Path]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(model[0])

    def read(folder: Path) -> Any:
        target = transformers.AutoModelForCausalLM.from_config(config)
        hub.load_torch_model(target, folder)
        return target

    one, other = compare(*model, read)
    assert logits(one) == logits(other)


def test_distributed_checkpoints(model: tuple[Path, Path]) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    shapes = {
        name: tensor
        for shard in model[0].glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(shard).items()
    }

    def read(folder: Path) -> dict[str, Any]:
        state = {name: torch.full_like(tensor, 7) for name, tensor in shapes.items()}
        dcp.load(state, storage_reader=storage.HuggingFaceStorageReader(path=str(folder)), no_dist=True)
        return state

    with pytest.warns(UserWarning, match="torch.distributed"):
        expected = read(model[0])
    assert_same(expected, shapes)
    with pytest.warns(UserWarning, match="torch.distributed"), pytest.raises(BaseException, match="overed"):
        read(model[1])
    with tzip.install(), pytest.warns(UserWarning, match="torch.distributed"):
        assert_same(read(model[1]), shapes)


@pytest.mark.parametrize("strict", [True, False])
def test_load_model(tmp_path: Path, strict: bool) -> None:
    """With weights that are shared, of which the file has one."""

    def make() -> Any:
        net = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 200))
        net[2].weight = net[0].weight
        return net

    (tmp_path / "net").mkdir()
    torch.manual_seed(4)
    safetensors.torch.save_model(make(), str(tmp_path / "net" / "model.safetensors"))

    def read(folder: Path) -> Any:
        net = make()
        assert safetensors.torch.load_model(net, folder / "model.safetensors", strict=strict) == (set(), [])
        return net

    compare(tmp_path / "net", pack(tmp_path / "net"), read)


# ---------------------------------------------------------------- other frameworks


def arrays(folder: Path) -> tuple[Path, Path]:
    """Save arrays of several dtypes; return the plain and the packed folder."""
    rng = np.random.default_rng(5)
    tensors = {
        "f": torch.from_numpy(rng.normal(0, 0.02, (100, 200)).astype("f4")),
        "h": torch.from_numpy(rng.normal(0, 0.02, (100, 200)).astype("f4")).to(torch.float16),
        "i": torch.arange(-7, 7, dtype=torch.int32),
        "flag": torch.tensor([True, False, True]),
    }
    (folder / "arrays").mkdir()
    safetensors.torch.save_file(tensors, folder / "arrays" / "load.safetensors")
    tensors["b"] = tensors["f"].to(torch.bfloat16)  # which the library reads from files alone but for torch
    safetensors.torch.save_file(tensors, folder / "arrays" / "load_file.safetensors")
    packed = pack(folder / "arrays")
    assert tzip.pack_in_place([packed]).changed == {}
    return folder / "arrays", packed


def compare_arrays(plain: Path, packed: Path, theirs: Any, ours: Any, raw: Callable[[Any], Any]) -> None:
    """Compare the library's module for a framework with and without the hook, and ours without, for files and for bytes."""

    def form(found: dict[str, Any]) -> dict[str, Any]:
        return {name: (type(value), str(value.dtype), tuple(value.shape), raw(value)) for name, value in found.items()}

    def calls(module: Any, folder: Path) -> list[Callable[[], Any]]:
        data = (folder / "load.safetensors").read_bytes()
        return [lambda: form(module.load_file(folder / "load_file.safetensors")), lambda: form(module.load(data))]

    expected = [call() for call in calls(theirs, plain)]
    assert [sorted(found) for found in expected] == [["b", "f", "flag", "h", "i"], ["f", "flag", "h", "i"]]
    for call in calls(theirs, packed):
        with pytest.raises(safetensors.SafetensorError):
            call()
    with tzip.install():
        assert [call() for call in calls(theirs, packed)] == expected
        assert [call() for call in calls(theirs, plain)] == expected
    assert [call() for call in calls(ours, packed)] == expected
    assert [call() for call in calls(ours, plain)] == expected


def test_flax(tmp_path: Path) -> None:
    pytest.importorskip("flax")
    theirs = pytest.importorskip("safetensors.flax")
    import tzip.safetensors.flax as ours

    compare_arrays(*arrays(tmp_path), theirs, ours, lambda value: np.asarray(value).tobytes())


def test_mlx(tmp_path: Path) -> None:
    core = pytest.importorskip("mlx.core")
    theirs = pytest.importorskip("safetensors.mlx")
    import tzip.safetensors.mlx as ours

    compare_arrays(*arrays(tmp_path), theirs, ours, lambda value: np.array(core.view(value, core.uint8)).tobytes())


def test_numpy(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    import safetensors.numpy as theirs

    import tzip.safetensors.numpy as ours

    compare_arrays(*arrays(tmp_path), theirs, ours, lambda value: value.tobytes())


def test_torch(tmp_path: Path) -> None:
    import tzip.safetensors.torch as ours

    compare_arrays(*arrays(tmp_path), safetensors.torch, ours, lambda value: bits(value)[2])


def test_flax_checkpoints_restore_a_module(tmp_path: Path) -> None:
    """A module's parameters as flax users keep them: flattened into a file, unflattened into a tree."""
    linen = pytest.importorskip("flax.linen")
    traverse = pytest.importorskip("flax.traverse_util")
    theirs = pytest.importorskip("safetensors.flax")
    import jax

    net = linen.Dense(500)
    x = jax.numpy.linspace(0, 1, 90).reshape(1, 90)
    parameters = net.init(jax.random.PRNGKey(0), x)
    (tmp_path / "net").mkdir()
    theirs.save_file(traverse.flatten_dict(parameters, sep="."), tmp_path / "net" / "n.safetensors")
    packed = pack(tmp_path / "net")
    with tzip.install():
        found = traverse.unflatten_dict(theirs.load_file(packed / "n.safetensors"), sep=".")
    assert np.asarray(net.apply(found, x)).tobytes() == np.asarray(net.apply(parameters, x)).tobytes()
