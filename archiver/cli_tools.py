"""Commands that are about this machine, not about an archive."""

import dataclasses
import json

import click


def bench_device(path: str, device: str, sample: int, repeat: int, as_json: bool) -> None:
    """Print how fast tensors come to a GPU; `tzip bench --device`."""
    from tzip.measure_device import measure_device

    figures = measure_device(path, device, sample=sample, repeat=repeat)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(f) for f in figures], indent=2))
        return
    click.echo(f"{device}; GB/s of tensors; the plain file loads at {figures[0].plain / 1e9:.2f}, "
               f"from storage at {figures[0].plain_cold / 1e9:.2f}")  # fmt: skip
    click.echo(f"{'level':8} {'size':>9} {'decode':>9} {'load':>9} {'from storage':>13}")
    for f in figures:
        size = f"{100 * f.bytes_out / max(f.bytes_in, 1):.2f} %"
        click.echo(f"{f.level:8} {size:>9} {f.decode / 1e9:9.2f} {f.load / 1e9:9.2f} {f.load_cold / 1e9:13.2f}")


@click.command("warm-up")
@click.option("--level", "-l", multiple=True, type=click.Choice(["fast", "default", "best", "max"]), help="Only these levels.")
@click.option("--dtype", "-d", multiple=True, type=click.Choice(["BF16", "F16", "F32"]), help="Only these types.")
def warm_up_command(level: tuple[str, ...], dtype: tuple[str, ...]) -> None:
    """Compile what packing and reading need, once for this machine: while an image is built, say."""
    from tzip.warming import FLOATS, warm_up

    warm_up(level or ("fast", "default", "best"), dtype or FLOATS)


@click.command()
@click.argument("action", type=click.Choice(["enable", "disable", "status"]))
def hook(action: str) -> None:
    """Make all Python programs of this virtual environment open packed files, or no longer.

    \b
    tzip hook enable      one .pth file in the environment's site-packages
    tzip hook status
    """
    from tzip import environments

    if action == "enable":
        click.echo(f"enabled by {environments.enable()}")
    elif action == "disable":
        click.echo("disabled" if environments.disable() else "it was not enabled")
    else:
        click.echo(f"enabled by {environments.hook_file()}" if environments.enabled() else "not enabled")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...]) -> None:
    """Run a command; it and its children open packed files wherever they open safetensors files.

    \b
    tzip run -- python train.py --model my-model/
    """
    from tzip import environments

    raise SystemExit(environments.run(list(command)))


COMMANDS = (warm_up_command, hook, run)
