"""`tzip hub`: many models at once, on this machine or a cluster."""

import dataclasses
import json
from typing import Any

import click

from tzip.cli_progress import percent, progress, size

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_quiet = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary; errors only.")
_threads = click.option("--threads", "-t", type=click.IntRange(min=1), help="Threads of each task (1).")


@click.group()
def hub() -> None:
    """Pack all models of a folder, fine-tunes as differences from their base."""


@hub.command()
@click.argument("root")
@click.option("--output", "-o", required=True, help="The folder of archives and receipts.")
@click.option("--engine", default="local", show_default=True, metavar="ENGINE",
              help="local, ray or dask; with '=' and a number of processes, or a cluster's address.")
@click.option("--level", "-l", type=click.Choice(["fast", "default", "best", "max"]), default="default", show_default=True)
@click.option("--max-chain", type=click.IntRange(min=0),
              help="Archives that a model is read through at most (4); 0: no differences.")
@click.option("--dereference", "-L", is_flag=True, default=None, help="Pack what links point to.")
@_threads
@_quiet
@_as_json
def pack(
    root: str,
    output: str,
    engine: str,
    level: str,
    max_chain: int | None,
    dereference: bool | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Pack every model below the folder ROOT, one task for each, into an archive of its own.

    \b
    tzip hub pack models/ -o packed/
    tzip hub pack models/ -o packed/ --engine ray=auto
    tzip hub pack models/ -o packed/ --engine dask=tcp://head:8786
    tzip unpack packed/archives/<id>.tzip        bases are found beside it

    A model is a folder with files of tensors or a config.json in it. What is packed already is left as it is: repeat the
    call when it was stopped, or when there are new models. All machines of a cluster need both folders under the same paths.
    """
    pack_hub(root, output, engine, level, threads, max_chain, dereference, quiet, as_json)


def pack_hub(
    root: str,
    output: str,
    engine: str,
    level: str,
    threads: int | None,
    max_chain: int | None,
    dereference: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Pack and report; `tzip hub pack` and `tzip pack --engine`. Failures of models become the exit code of the first."""
    from tzip.hub import bulk

    chain = bulk.MAX_CHAIN if max_chain is None else max_chain
    with progress("packing", None, quiet) as shown:
        report = bulk.pack_hub(root, output, engine=engine, level=level, threads=threads or 1, max_chain=chain,
                               dereference=dereference or None, progress=shown.reached)  # fmt: skip
    _tell(report, quiet, as_json)


@hub.command("ls")
@click.argument("output", metavar="FOLDER")
@_as_json
def ls_command(output: str, as_json: bool) -> None:
    """Show what was packed into FOLDER, from its receipts.

    \b
    tzip hub ls packed/
    tzip hub ls packed/ --json | jq '.models[] | .archive'
    """
    from tzip.hub import bulk

    _tell(bulk.hub_report(output), False, as_json)


@hub.command()
@click.argument("folder")
@click.argument("model")
@click.option("--output", "-o", help="The folder to restore into (default: the current one).")
@click.option("--force", "-f", is_flag=True, help="Replace output that exists.")
@_threads
@_quiet
def unpack(folder: str, model: str, output: str | None, force: bool, threads: int | None, quiet: bool) -> None:
    """Restore MODEL, named as `tzip hub ls` shows it, from FOLDER.

    \b
    tzip hub unpack packed/ org/model -o there/
    """
    from tzip.hub import bulk

    with progress("unpacking", None, quiet) as shown:
        report = bulk.unpack_model(folder, model, output, threads=threads, force=force, progress=shown)
    if not quiet:
        click.echo(f"{report.target}: {len(report.members)} members, {size(report.bytes_out)}", err=True)


def _tell(report: Any, quiet: bool, as_json: bool) -> None:
    if as_json:
        told = {"models": [dataclasses.asdict(r) for r in report.receipts], "packed": report.packed}
        told |= {"bytes_in": report.bytes_in, "bytes_out": report.bytes_out, "left": report.left}
        told |= {"failures": {name: dataclasses.asdict(f) for name, f in report.failures.items()}}
        click.echo(json.dumps(told, indent=1, ensure_ascii=False))
    elif not quiet:
        width = max((len(r.model) for r in report.receipts), default=5)
        click.echo(f"{'model':{width}} {'size':>10} {'packed':>10} {'':>8}  {'archive':12}  base")
        for r in report.receipts:
            click.echo(
                f"{r.model:{width}} {size(r.bytes_in):>10} {size(r.bytes_out):>10} {percent(r.bytes_out, r.bytes_in):>8}  "
                f"{r.archive[:12]}  {r.base_model}"
            )
        click.echo(
            f"{len(report.receipts)} models, {report.packed} of them packed now: {size(report.bytes_in)} -> "
            f"{size(report.bytes_out)}, {percent(report.bytes_out, report.bytes_in)}"
        )
    for path, why in report.left.items():
        click.echo(f"tzip: {path}: left out, {why}", err=True)
    for name, failure in report.failures.items():
        click.echo(f"tzip: {name}: not packed: {failure.message}", err=True)
    if report.failures:
        raise SystemExit(next(iter(report.failures.values())).exit_code)
