"""Commands that are about this machine, not about an archive."""

import click


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
