"""The command `tzip`. Data goes to stdout, messages to stderr, errors become stable exit codes."""

import contextlib
import dataclasses
import glob
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import click

import tzip
from tzip import cli_hub, cli_store, cli_tools
from tzip.cli_progress import percent as _percent
from tzip.cli_progress import progress as _progress
from tzip.cli_progress import size as _size
from tzip.coders.errors import TzipError, UsageError
from tzip.version import __version__

_INTERRUPTED = 130
_OS_ERROR = 6

_CODES = """\b
Exit codes: 0 done, 2 wrong use, 3 corrupt, 4 truncated, 5 made by a newer
tzip, 6 operating system, 7 not an archive, 8 input changed, 10 the base of
differences is missing, 11 another writer of the run, 130 interrupted."""


class _Command(click.Group):
    """Turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_OS_ERROR)
        except (KeyboardInterrupt, TzipError, OSError, MemoryError) as e:
            text = {KeyboardInterrupt: "interrupted", MemoryError: "out of memory"}.get(type(e), str(e))
            for line in (text, *getattr(e, "__notes__", ())):
                click.echo(f"tzip: {line}", err=True)
            code = e.exit_code if isinstance(e, TzipError) else _OS_ERROR
            ctx.exit(_INTERRUPTED if isinstance(e, KeyboardInterrupt) else code)


def _json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def _on_terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _expand(paths: tuple[str, ...]) -> list[str]:
    """Expand patterns that the shell left alone, as cmd.exe does with all."""
    out: list[str] = []
    for path in paths:
        found = [] if path == "-" or os.path.lexists(path) else sorted(glob.glob(path))
        out += found or [path]
    return out


_threads = click.option("--threads", "-t", type=click.IntRange(min=1), help="Threads; default: one for each CPU.")
_force = click.option("--force", "-f", is_flag=True, help="Replace output that exists.")
_quiet = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary; errors only.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_base = click.option(
    "--base",
    "-b",
    multiple=True,
    help="An earlier file, folder or archive, which differences are from (again for more).",
)
_level = click.option(
    "--level",
    "-l",
    type=click.Choice(["fast", "default", "best", "max"]),
    default="default",
    show_default=True,
    help="fast: Huffman, no rANS; default: rANS, smaller; best: tries more, slower to pack; max: best, and fits factors of "
    "low rank to differences, far slower to pack.",
)


@click.group(cls=_Command, epilog=_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tzip")
def cli() -> None:
    """Pack model weights and tensors losslessly; restore them byte for byte.

    \b
    tzip pack model.safetensors          -> model.safetensors.tzip
    tzip pack my-model/                  -> my-model.tzip
    tzip unpack my-model.tzip -o there/  -> there/my-model/…
    tzip ls my-model.tzip                members and tensors
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _on_terminate)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: object = None
) -> None:
    click.echo(f"tzip: warning: {message}", err=True)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--output", "-o", help="The archive; '-' is stdout. Default: PATH.tzip.")
@click.option("--each", is_flag=True, help="One archive for each file, beside it (or in the folder -o).")
@click.option("--dereference", "-L", is_flag=True, default=None, help="Pack what links point to.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted call stopped; keep what is done when this one stops.")
@click.option("--strict", is_flag=True, help="Refuse .safetensors files that break the rules of their format.")
@click.option("--no-sha256", is_flag=True, help="Leave out the SHA-256 of each file, the only serial stage.")
@click.option("--verify", "verify_kind", type=click.Choice(["chunks", "file"]), default="chunks", show_default=True,
              help="chunks: decode and compare each chunk before it is written; file: read the finished file back too.")
@click.option("--name", help="The member's name when packing stdin.", default="data", show_default=True)
@click.option("--in-place", is_flag=True, help="Replace .safetensors files, in folders too, by packed ones of the same name.")
@click.option("--engine", metavar="ENGINE", help="Pack all models below PATH into the folder -o, as `tzip hub pack` does.")
@_base
@_level
@_threads
@_force
@_quiet
@_as_json
def pack(
    paths: tuple[str, ...],
    output: str | None,
    each: bool,
    dereference: bool | None,
    resume: bool,
    strict: bool,
    no_sha256: bool,
    verify_kind: str,
    name: str,
    in_place: bool,
    engine: str | None,
    base: tuple[str, ...],
    level: str,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Pack files and folders into an archive.

    \b
    tzip pack model.safetensors
    tzip pack my-model/ -o /backup/my-model.tzip --level best
    tzip pack *.safetensors -o shards.tzip
    tzip pack checkpoints/ --each            one archive for each file
    tzip pack hub/ -o packed/ --engine ray   one archive for each model, on a cluster
    cat model.safetensors | tzip pack - --name model.safetensors > model.tzip
    tzip pack --in-place my-model/           readers need tzip.install()
    tzip pack step-200.safetensors --base step-100.safetensors.tzip

    Every chunk is decoded and compared with its source before it is written. Links that lead out of a folder
    are refused unless -L is given (it is the default inside a hub cache's snapshot folder).
    """
    sources = _expand(paths)
    if engine is not None:
        others = [each, resume, strict, no_sha256, verify_kind != "chunks", name != "data", in_place, base, force]
        if any(others) or output in (None, "-") or len(sources) != 1:
            raise UsageError("--engine takes one folder, -o FOLDER, -L, --level and --threads, and no other option of packing")
        cli_hub.pack_hub(sources[0], str(output), engine, level, threads, None, dereference, quiet, as_json)
        return
    if in_place:
        others = [output, each, dereference, resume, strict, no_sha256, verify_kind != "chunks", name != "data", base]
        if any(others) or "-" in sources:
            raise UsageError("--in-place takes --level and --threads, and no other option of packing")
        with _progress("packing", None, quiet) as progress:
            changes = tzip.pack_in_place(sources, level=level, threads=threads, progress=progress)
        _tell_in_place(changes, quiet, as_json)
        return
    options = {
        "level": level,
        "threads": threads,
        "force": force,
        "sha256": not no_sha256,
        "dereference": dereference or None,
        "strict": strict,
        "resume": resume,
        "verify_file": verify_kind == "file",
        "base": base or None,
    }
    if each:
        reports = _pack_each(sources, output, options, quiet)
    elif "-" in sources:
        if len(sources) > 1:
            raise UsageError("stdin is packed alone")
        target = _stdout() if output in (None, "-") else output
        with _progress("packing", None, quiet) as progress:
            reports = [tzip.pack(sys.stdin.buffer, target, name=name, progress=progress, **options)]  # type: ignore[arg-type]
    else:
        if output is None and len(sources) > 1:
            raise UsageError("several inputs need -o ARCHIVE (or --each)")
        source: Any = sources[0] if len(sources) == 1 else sources
        reports = [_pack_one(source, _stdout() if output == "-" else output, options, quiet)]
    if as_json:
        data = [dataclasses.asdict(r) for r in reports]
        _json(data if each else data[0]) if output != "-" else None
    elif not quiet:
        for report in reports:
            click.echo(
                f"{report.archive or 'stdout'}: {_size(report.bytes_in)} -> {_size(report.bytes_out)}, "
                f"{_percent(report.bytes_out, report.bytes_in)}, {len(report.members)} members, {report.seconds:.1f} s",
                err=True,
            )


def _tell_in_place(report: Any, quiet: bool, as_json: bool) -> None:
    if as_json:
        _json(dataclasses.asdict(report))
    elif not quiet:
        for path, (before, after) in report.changed.items():
            click.echo(f"{path}: {_size(before)} -> {_size(after)}, {_percent(after, before)}", err=True)
        for path, why in report.left.items():
            click.echo(f"{path}: left as it is, {why}", err=True)


def _pack_one(source: Any, target: Any, options: dict[str, Any], quiet: bool) -> Any:
    from tzip.tree import collect

    named = [source] if isinstance(source, str) else source
    total = sum(item.size for item in collect(named, options["dereference"]))
    with _progress("packing", total, quiet) as progress:
        return tzip.pack(source, target, progress=progress, **options)


def _pack_each(sources: list[str], output: str | None, options: dict[str, Any], quiet: bool) -> list[Any]:
    from tzip.formats.catalogue import FILE
    from tzip.tree import collect

    reports = []
    for source in sources:
        for item in collect([source], options["dereference"]):
            if item.kind != FILE:
                continue
            if output is None:
                target = Path(item.original + ".tzip")
            else:
                target = Path(output) / f"{item.name}.tzip"
                target.parent.mkdir(parents=True, exist_ok=True)
            reports.append(_pack_one(item.original, target, options, quiet))
    return reports


def _stdout() -> BinaryIO:
    if sys.stdout.isatty():
        raise UsageError("an archive is not written to a terminal; redirect stdout or use -o")
    return sys.stdout.buffer


@cli.command()
@click.argument("archive")
@click.argument("members", nargs=-1, metavar="[MEMBER...]")
@click.option("--output", "-o", help="The folder to restore into (default: the current one); '-' writes one member to stdout.")
@click.option("--resume", is_flag=True, help="Keep files that are already right (by SHA-256), restore the others.")
@click.option("--in-place", is_flag=True, help="Replace files packed in place, in folders too, by the files they hold.")
@_base
@_threads
@_force
@_quiet
@_as_json
def unpack(
    archive: str,
    members: tuple[str, ...],
    output: str | None,
    resume: bool,
    in_place: bool,
    base: tuple[str, ...],
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Restore the members of an archive, byte for byte.

    \b
    tzip unpack model.safetensors.tzip
    tzip unpack my-model.tzip -o there/ my-model/config.json
    tzip unpack model.tzip -o - > model.safetensors
    tzip unpack --in-place my-model/

    Each file appears whole, after its sums were proven, or not at all. Bases of differences are looked for in --base, beside
    the archive and in $TZIP_BASE_PATH, and known by their SHA-256.
    """
    if in_place:
        if output or resume or base or archive == "-":
            raise UsageError("--in-place takes paths and --threads, and no other option of unpacking")
        with _progress("unpacking", None, quiet) as progress:
            changes = tzip.unpack_in_place(_expand((archive, *members)), threads=threads, progress=progress)
        _tell_in_place(changes, quiet, as_json)
        return
    source: Any = sys.stdin.buffer if archive == "-" else archive
    target: Any = _stdout() if output == "-" else output
    total = None
    if archive != "-":
        with tzip.open(archive) as opened:
            total = sum(m.size for m in opened.members()) if not members else None
    with _progress("unpacking", total, quiet) as progress:
        report = tzip.unpack(
            source, target, members=members, threads=threads, force=force, resume=resume, base=base, progress=progress
        )
    if as_json and output != "-":
        _json(dataclasses.asdict(report))
    elif not quiet:
        kept = f", {len(report.kept)} were there" if report.kept else ""
        click.echo(
            f"{report.target}: {len(report.members)} members{kept}, {_size(report.bytes_out)}, {report.seconds:.1f} s",
            err=True,
        )


@cli.command()
@click.argument("archive")
@click.option("--members", "-m", "only_members", is_flag=True, help="Members only, no tensors.")
@_as_json
def ls(archive: str, only_members: bool, as_json: bool) -> None:
    """List members and tensors: dtype, shape, sizes, ratio, codecs. Reads the index only.

    \b
    tzip ls model.tzip
    tzip ls model.tzip --json | jq '.tensors[] | select(.dtype == "BF16") | .name'
    """
    with tzip.open(archive) as opened:
        members, size = opened.members(), opened.reader.source.size
        tensors = [] if only_members else opened.tensors()
    if as_json:
        _json({"members": [dataclasses.asdict(m) for m in members], "tensors": [dataclasses.asdict(t) for t in tensors]})
        return
    lines = []
    by_member: dict[str, list[Any]] = {}
    for tensor in tensors:
        by_member.setdefault(tensor.member, []).append(tensor)
    for member in members:
        lines.append(f"{member.kind:6} {member.size:>15,} {_percent(member.stored, member.size):>9}  {member.name}")
        for t in by_member.get(member.name, ()):
            shape = "x".join(map(str, t.shape)) or "scalar"
            codecs = "+".join(t.codecs) or "inline"
            lines.append(
                f"  {t.dtype:11} {t.nbytes:>13,} {_percent(t.stored, t.nbytes):>9}  {t.name}  {shape}  {codecs}"
            )
    total, stored = sum(m.size for m in members), size
    lines.append(f"{len(members)} members, {total:,} bytes in {stored:,}, {_percent(stored, total)}")
    click.echo("\n".join(lines))


@cli.command()
@click.argument("archive")
@_as_json
def info(archive: str, as_json: bool) -> None:
    """Show the format as the file has it: header, index, structure found, blocks by plane and codec.

    \b
    tzip info model.tzip
    """
    from tzip.inspecting import describe

    data = describe(archive)
    if as_json:
        _json(data)
        return
    for key, value in data.items():
        if key not in ("transforms", "blocks"):
            click.echo(f"{key:16} {value}")
    click.echo(f"{'structure':24} {'chunks':>8} {'bytes':>16} {'stored':>16}")
    for row in data["transforms"]:
        click.echo(f"{row['transform']:24} {row['chunks']:>8,} {row['bytes']:>16,} {row['stored']:>16,}")
    click.echo(f"{'split':24} {'plane':>5} {'codec':10} {'t':>2} {'blocks':>8} {'shared':>8} {'escapes':>10} {'stored':>16}")
    for row in data["blocks"]:
        click.echo(
            f"{row['split']:24} {row['plane']:>5} {row['codec']:10} {row['joined']:>2} {row['blocks']:>8,} "
            f"{row['shared']:>8,} {row['escapes']:>10,} {row['stored']:>16,}"
        )


@cli.command()
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@click.option("--deep", is_flag=True, help="Decode everything; compare all sums and the SHA-256 of every file.")
@_base
@_threads
@_quiet
@_as_json
def verify(
    archives: tuple[str, ...], deep: bool, base: tuple[str, ...], threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Prove that archives are sound: structure and stored bytes; with --deep the decoded bytes too.

    \b
    tzip verify *.tzip
    tzip verify --deep model.tzip
    """
    reports = {}
    for path in _expand(archives):
        source: Any = sys.stdin.buffer if path == "-" else path
        with _progress("verifying", None if deep or not os.path.exists(path) else os.path.getsize(path), quiet) as progress:
            report = tzip.verify(source, deep=deep, threads=threads, base=base, progress=progress)
        reports[path] = dataclasses.asdict(report)
        if not as_json and not quiet:
            how = "decoded and compared" if deep else "stored bytes sound"
            click.echo(f"{path}: {report.members} members, {report.chunks} chunks, {how}")
            if report.without_sha256:
                click.echo(f"{path}: {len(report.without_sha256)} members have no SHA-256", err=True)
    if as_json:
        _json(reports)


@cli.command()
@click.argument("archive")
@click.option("--output", "-o", required=True, help="The folder for what is recovered.")
@_base
@_threads
@_force
@_quiet
@_as_json
def recover(
    archive: str, output: str, base: tuple[str, ...], threads: int | None, force: bool, quiet: bool, as_json: bool
) -> None:
    """Save what is whole in a damaged archive, with or without its index.

    Whole members get their names; whole tensors of other members go to MEMBER.recovered.safetensors; the rest is
    listed, and the exit code is 3.

    \b
    tzip recover damaged.tzip -o saved/
    """
    with _progress("recovering", None, quiet) as progress:
        report = tzip.recover(archive, output, threads=threads, force=force, base=base, progress=progress)
    if as_json:
        _json(dataclasses.asdict(report))
    else:
        for name in report.whole:
            proof = " (no SHA-256 to compare)" if name in report.unproven else ""
            click.echo(f"whole  {name}{proof}")
        for name, names in report.tensors.items():
            click.echo(f"part   {name}: {len(names)} tensors in {name}.recovered.safetensors")
        for line in report.lost:
            click.echo(f"lost   {line}")
        if not report.index_found:
            click.echo("the index is lost: members whose own record is damaged cannot even be named", err=True)
    if report.lost:
        raise SystemExit(3)


@cli.command()
@click.argument("archive")
@click.argument("tensor")
@click.option("--member", "-m", help="The member, when several have a tensor of that name.")
@click.option("--output", "-o", required=True, help="A .npy file; '-' is stdout.")
@click.option("--raw", is_flag=True, help="The tensor's bytes instead of .npy.")
@_base
@_threads
@_force
def cat(
    archive: str,
    tensor: str,
    member: str | None,
    output: str,
    raw: bool,
    base: tuple[str, ...],
    threads: int | None,
    force: bool,
) -> None:
    """Write one tensor as .npy, or as raw bytes where numpy has no name for its dtype (bfloat16, float8 …).

    \b
    tzip cat model.tzip lm_head.weight -o lm_head.npy
    tzip cat model.tzip lm_head.weight --raw -o - | sha256sum
    """
    import io

    import numpy as np

    from tzip.formats.atomic import PartialFile

    with tzip.open(archive, base=base) as opened:
        view = opened.tensor(tensor, member)
        if not raw:
            dtype = None if view.element_type.numpy() is None else view.dtype
            if dtype is None or np.dtype(dtype.str) != dtype:
                raise UsageError(f".npy has no name for {view.element_type.name}; --raw writes the bytes").at(tensor=tensor)
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                buffer, {"descr": dtype.str, "fortran_order": False, "shape": view.shape}
            )
        data = view.raw(threads)
        parts: list[Any] = ([] if raw else [buffer.getvalue()]) + [memoryview(data)]
    if output == "-":
        out = _stdout()
        for part in parts:
            out.write(part)
        out.flush()
        return
    with PartialFile(Path(output), force=force) as partial:
        for part in parts:
            partial.write(part)
        partial.publish()


@cli.command()
@click.argument("archive")
@click.option("--output", "-o", required=True, help="The new archive.")
@click.option("--no-base", is_flag=True, help="Store no differences: the new archive needs no other file.")
@_base
@_level
@_threads
@_force
@_quiet
@_as_json
def repack(
    archive: str,
    output: str,
    no_base: bool,
    base: tuple[str, ...],
    level: str,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write an archive anew at another level; the SHA-256 of every member stays the same.

    \b
    tzip repack model.tzip -o smaller.tzip --level best
    tzip repack step-200.tzip -o whole.tzip --no-base
    """
    with tzip.open(archive) as opened:
        total, old = sum(m.size for m in opened.members()), opened.reader.source.size
    with _progress("repacking", total, quiet) as progress:
        report = tzip.repack(
            archive, output, level=level, threads=threads, force=force, base=base, keep_base=not no_base, progress=progress
        )
    if as_json:
        _json(dataclasses.asdict(report))
    elif not quiet:
        click.echo(f"{output}: {_size(old)} -> {_size(report.bytes_out)}, {report.seconds:.1f} s", err=True)


@cli.command()
@click.argument("old")
@click.argument("new")
@_as_json
def diff(old: str, new: str, as_json: bool) -> None:
    """Say what changed between two files, folders or archives, tensor by tensor.

    \b
    tzip diff step-100.safetensors step-200.safetensors.tzip
    """
    found = tzip.diff(old, new)
    if as_json:
        rows = [dataclasses.asdict(d) for d in found]  # JSON has no numbers that are none
        _json([{k: None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in rows])
        return
    click.echo(f"{'state':8} {'dtype':11} {'equal':>9} {'bits':>7} {'relative':>9}  tensor")
    for d in found:
        relative = f"{d.norm / d.old_norm:.2e}" if d.norm is not None and d.old_norm else "-"
        bits = f"{d.bits:.2f}" if d.state == "changed" else "-"
        share = f"{100 * d.equal:.2f} %" if d.state in ("equal", "changed") else "-"
        click.echo(f"{d.state:8} {d.dtype:11} {share:>9} {bits:>7} {relative:>9}  {d.name}")


@cli.command()
@click.argument("path")
@click.option("--html", "output", required=True, metavar="PAGE", help="The page to write; '-' is stdout.")
@click.option("--threads", "-t", default=1, show_default=True, type=click.IntRange(min=1))
@_base
@_force
@_quiet
def inspect(path: str, output: str, threads: int, base: tuple[str, ...], force: bool, quiet: bool) -> None:
    """Write a page about a file or archive: where its bytes are, what tzip gains. Packs nothing.

    \b
    tzip inspect model.safetensors --html model.html
    tzip inspect step-200.safetensors --base step-100.safetensors --html step.html
    """
    from tzip.formats.atomic import PartialFile
    from tzip.report import report

    page = report(path, base=base or None, threads=threads)
    if output == "-":
        click.echo(page, nl=False)
        return
    with PartialFile(Path(output), force=force) as partial:
        partial.write(page.encode())
        partial.publish()
    if not quiet:
        click.echo(f"{output}: {_size(len(page.encode()))}", err=True)


@cli.command()
@click.argument("path")
@click.option("--sample", default=256, show_default=True, type=click.IntRange(min=1), help="MB to measure of a larger input.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(min=1), help="Runs; the best counts.")
@click.option("--threads", "-t", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--device", help="Measure loading to a GPU instead: cuda, cuda:1 …")
@_quiet
@_as_json
def bench(path: str, sample: int, repeat: int, threads: int, device: str | None, quiet: bool, as_json: bool) -> None:
    """Measure size and speed of every level on your own file or folder, in memory.

    \b
    tzip bench model.safetensors
    tzip bench my-model/ --sample 1000 --threads 8
    """
    from tzip.measure import measure

    if device is not None:
        cli_tools.bench_device(path, device, sample * 1_000_000, repeat, as_json)
        return
    with _progress("measuring", None, quiet) as progress:
        figures = measure(path, threads=threads, sample=sample * 1_000_000, repeat=repeat, progress=progress)
    if as_json:
        _json([dataclasses.asdict(f) for f in figures])
        return
    click.echo(f"{_size(figures[0].bytes_in)} measured, {threads} threads, a copy runs at {_size(int(figures[0].copy))}/s")
    click.echo(f"{'level':8} {'size':>9} {'encode':>12} {'decode':>12}")
    for f in figures:
        encode, decode = f"{_size(int(f.encode))}/s", f"{_size(int(f.decode))}/s"
        click.echo(f"{f.level:8} {_percent(f.bytes_out, f.bytes_in):>9} {encode:>12} {decode:>12}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, for example: eval "$(tzip completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "tzip", "_TZIP_COMPLETE").source())


for _command in (*cli_tools.COMMANDS, cli_store.store, cli_hub.hub):
    cli.add_command(_command)


def main(run: Callable[..., Any] = cli) -> None:
    """Run the command; the entry point of the script `tzip`."""
    run(prog_name="tzip")


if __name__ == "__main__":
    main()
