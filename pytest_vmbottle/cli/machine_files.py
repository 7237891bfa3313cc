"""`vmbottle machine cp`, `read`, `search` and the like: files of machines."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pytest_vmbottle.cli.command import emit, examples, json_option, one_line, say
from pytest_vmbottle.cli.completion import copy_sides
from pytest_vmbottle.cli.kept import STANDARD, ask, name_argument, sink
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.shown import visible

__all__ = ["archive", "cp", "list_folder", "read", "search", "upload"]

# A letter first, so that paths such as `./a:b` and `/a:b` are files of this computer. With DOTALL, because a file's name may have a
# newline.
_GUEST_SIDE = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,40}):(.*)", re.DOTALL)
_LETTERS = {"dir": "d", "file": "-", "symlink": "l"}


def _guest_path(_: click.Context, __: click.Parameter, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for path in (value,) if isinstance(value, str) else value:
        if not path.startswith("/"):
            raise click.BadParameter(f"{path!r}: a path in the machine begins with a slash")
    return value


@click.command(
    epilog=examples(
        "vmbottle machine cp site web:/srv",
        "vmbottle machine cp site/ web:/var/www/html",
        "vmbottle machine cp web:/var/log/syslog .",
        "vmbottle machine cp ./a:b web:/",
        "pg_dump shop | vmbottle machine cp - db:/tmp/shop.sql",
        "vmbottle machine cp web:/etc/hosts - | wc -l",
    )
)
@click.argument("src", shell_complete=copy_sides)
@click.argument("dst", shell_complete=copy_sides)
def cp(*, src: str, dst: str) -> None:
    """Copy a file or a tree to a machine, or from it; NAME:/PATH is the machine's side.

    Modes and symbolic links are kept. If the destination is a folder, the copy goes into it, as with `cp -r`. With a slash at its end, the
    source means the contents of the folder, as with rsync: they go into the destination, which is made if need be. A dash is standard input
    or standard output. A file of this computer with a colon in its name needs a slash before it, such as ./a:b.
    """
    # Both are tried, because two sides in machines are a mistake of their own.
    there, here = _GUEST_SIDE.fullmatch(src), _GUEST_SIDE.fullmatch(dst)
    guest = there or here
    if "" in (src, dst):
        raise click.UsageError("a path is empty: perhaps a variable was not set")
    if guest is None or (there and here):
        raise click.UsageError("exactly one side must be in a machine: write it as NAME:/PATH")
    name, path = guest[1], guest[2]
    if not path.startswith("/"):
        raise click.UsageError(f"{guest[0]!r}: the path in the machine must begin with a slash, such as {name}:/tmp")
    if there:
        _copy_out(name, path, dst)
    else:
        _copy_in(name, src, path)


def _copy_in(name: str, source: str, path: str) -> None:
    if source == STANDARD:
        ask(name, "write", (0,), path=path, mode=None, owner=None)
    elif source.endswith("/") and path.strip("/"):
        ask(name, "upload", src=_absolute(source), dest=path, clean=False)
    elif source.endswith("/"):  # all of a guest's file system has no place beside it, where an upload would begin
        for child in sorted(Path(source).iterdir()):
            ask(name, "cp", to_guest=True, src=_absolute(str(child)), dst=path)
    else:
        ask(name, "cp", to_guest=True, src=_absolute(source), dst=path)


def _copy_out(name: str, path: str, target: str) -> None:
    if target == STANDARD:
        _read(name, path)
    elif path.endswith("/") and os.path.lexists(target):
        # One by one, because a copy of the folder itself would go into the one that is there.
        for entry in ask(name, "list", paths=[path], depth=1):
            ask(name, "cp", to_guest=False, src=entry["path"], dst=_absolute(target))
    else:
        ask(name, "cp", to_guest=False, src=path, dst=_absolute(target))


def _absolute(path: str) -> str:
    # The daemon works in another folder. Not `resolve`, which follows links.
    return os.path.abspath(path)  # noqa: PTH100 - see above


@click.command(epilog=examples("vmbottle machine read web /etc/os-release", "vmbottle machine read web /var/lib/dump.gz > dump.gz"))
@name_argument
@click.argument("path", callback=_guest_path)
def read(*, name: str, path: str) -> None:
    """Write a file of a machine to standard output, byte for byte.

    On a terminal control characters are made visible.
    """
    _read(name, path)


def _read(name: str, path: str) -> None:
    if not sys.stdout.isatty():
        with sink(STANDARD) as fd:
            ask(name, "read", (fd,), path=path)
        return
    # A file of a guest must not move the cursor, or type into this terminal.
    with tempfile.TemporaryFile() as file:
        ask(name, "read", (file.fileno(),), path=path)
        file.seek(0)
        click.echo(visible(file.read().decode(errors="replace")), nl=False)


@click.command("ls-dir", epilog=examples("vmbottle machine ls-dir web /etc", "vmbottle machine ls-dir web /srv --depth 3 --json"))
@name_argument
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, callback=_guest_path)
@click.option("--depth", type=click.IntRange(1), default=1, show_default=True, help="Levels of folders to list.")
@click.option("-R", "--recursive", is_flag=True, help="List all levels.")
@json_option
def list_folder(*, name: str, paths: tuple[str, ...], depth: int, recursive: bool, as_json: bool) -> None:
    """List the files in folders of a machine."""
    entries: list[dict[str, Any]] = ask(name, "list", paths=paths, depth=None if recursive else depth)
    if as_json:
        emit(entries)
        return
    for entry in entries:
        click.echo(_entry(entry))


def _entry(entry: Mapping[str, Any]) -> str:
    letter, path = _LETTERS.get(entry["type"], "?"), one_line(entry["path"])
    if entry.get("mtime") is None:  # the guest tells the names only
        return f"{letter} {path}"
    changed = datetime.fromtimestamp(entry["mtime"], UTC).isoformat(timespec="minutes")[:16]
    return f"{letter} {entry['mode'] & 0o7777:04o} {format_size(entry['size']):>8}  {changed}  {path}"


@click.command(
    epilog=examples(
        "vmbottle machine search web error /var/log", "vmbottle machine search web -i -E 'fail(ed|ure)' /var/log --include '*.log' --json"
    )
)
@name_argument
@click.argument("pattern")
@click.argument("root", callback=_guest_path)
@click.option("-E", "--regex", is_flag=True, help="PATTERN is an extended regular expression, and no literal text.")
@click.option("-i", "--ignore-case", is_flag=True, help="Ignore the case of letters.")
@click.option("--include", metavar="GLOB", multiple=True, help="Search only files whose name matches.")
@click.option("--exclude-dir", "exclude_dirs", metavar="GLOB", multiple=True, help="Leave out folders whose name matches.")
@click.option("-m", "--max-results", type=click.IntRange(1), default=500, show_default=True, help="Show at most so many lines.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="SECONDS", help="Search no longer."
)
@json_option
def search(*, name: str, as_json: bool, **query: Any) -> None:
    """Search the files of a machine below ROOT for a PATTERN.

    A line is shown as `path:number:text`. The exit status is 1 if nothing was found.
    """
    found: dict[str, Any] = ask(name, "search", **query)
    if as_json:
        emit(found)
    else:
        for match in found["matches"]:
            click.echo(f"{one_line(match['path'])}:{match['line']}:{visible(match['text'])}")
    if found["truncated"]:
        say(f"there are more than {query['max_results']} such lines: --max-results shows more")
    if found["timed_out"]:
        say(f"the search ended after {query['timeout']:g} s, before it was complete: --timeout gives it more time")
    if not found["matches"]:
        # As grep does, so that scripts can ask whether something is there.
        click.get_current_context().exit(1)


@click.command(epilog=examples("vmbottle machine archive web /etc -o etc.tar.gz", "vmbottle machine archive web /srv -o - | tar tz"))
@name_argument
@click.argument("root", callback=_guest_path)
@click.option("-o", "--output", required=True, metavar="FILE", help="File to write; - is standard output.")
@click.option("--format", "form", type=click.Choice(["tar.gz", "zip"]), help="By default zip for a FILE of that suffix, else tar.gz.")
def archive(*, name: str, root: str, output: str, form: str | None) -> None:
    """Pack a folder of a machine into a file."""
    with sink(output) as fd:
        ask(name, "archive", (fd,), root=root, format=form or ("zip" if output.endswith(".zip") else "tar.gz"))


@click.command(
    epilog=examples("vmbottle machine upload web /srv/site index.html img", "vmbottle machine upload web /srv/site --clean site/")
)
@name_argument
@click.argument("dest", callback=_guest_path)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--clean", is_flag=True, help="Replace all that is in DEST.")
def upload(*, name: str, dest: str, files: tuple[str, ...], clean: bool) -> None:
    """Copy files and folders into the folder DEST of a machine, all of them or none.

    DEST is made if need be. With a slash at its end, a FILE means the contents of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="vmbottle-") as folder:
        _gather(files, Path(folder))
        ask(name, "upload", src=folder, dest=dest, clean=clean)


def _gather(files: Sequence[str], folder: Path) -> None:
    for file in files:
        for path in sorted(Path(file).iterdir()) if file.endswith("/") else [Path(file)]:
            target = folder / path.absolute().name
            if os.path.lexists(target):
                raise click.UsageError(f"two of the files are called {target.name}")
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target, symlinks=True)
            else:
                shutil.copy2(path, target, follow_symlinks=False)
