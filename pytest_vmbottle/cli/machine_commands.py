"""`vmbottle machine exec`, `shell` and the like: commands in machines, and other ways into them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import emit, examples, json_option, say
from pytest_vmbottle.cli.completion import machine_names
from pytest_vmbottle.cli.kept import ask, find_machine, name_argument, sink
from pytest_vmbottle.cli.words import LeadingOptions, env_option
from pytest_vmbottle.shown import visible
from pytest_vmbottle.standalone.asking import request, streams
from pytest_vmbottle.standalone.quick import exit_status

if TYPE_CHECKING:
    from pytest_vmbottle.channels.port import Terminal
    from pytest_vmbottle.standalone.client import Kept

__all__ = [
    "execute",
    "forward",
    "gdb",
    "journal",
    "on_terminal",
    "qmp",
    "screenshot",
    "send_console",
    "send_keys",
    "shell",
    "ssh_config",
    "text",
    "with_streams",
]

_TIMED_OUT = 124
"""Exit status of a command that was killed at its --timeout, as that of timeout(1)."""


@click.command(
    "exec",
    cls=LeadingOptions,
    epilog=examples(
        "vmbottle machine exec web systemctl status nginx",
        "vmbottle machine exec web -u nobody -w /tmp -e LANG=C -- sh -c 'id; env'",
        "tar c site | vmbottle machine exec web tar x -C /srv",
        "vmbottle machine exec -t web htop",
    ),
)
@click.argument("name", shell_complete=machine_names)
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True)
@click.option("-u", "--user", help="User that runs it; by default the one of `machine start`.")
@click.option("-w", "--workdir", "cwd", metavar="DIR", help="Folder in which it runs; / by default.")
@env_option
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Kill it after this time, and end with status 124."
)
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on, even if it is a terminal.")
@click.option("-t", "--tty", is_flag=True, help="Run it on a terminal, which is this one.")
def execute(  # noqa: PLR0913 - one for each option
    *,
    name: str,
    words: tuple[str, ...],
    user: str | None,
    cwd: str | None,
    env: Mapping[str, str],
    timeout: float | None,
    interactive: bool,
    tty: bool,
) -> None:
    """Run a command in a machine.

    The exit status is the command's; 128 + N if signal N ended it. Its output comes at once and byte for byte. Standard input is passed on
    unless it is a terminal; -i passes on that as well. The words run as they are: for a pipe or a variable write `sh -c '...'`. Options of
    `exec` stand before the command, which may follow after `--`. Ctrl-C ends the command in the guest too.

    With -t the command has a terminal: keys, Ctrl-C and the size of the window go to it, and Ctrl-] leaves it.
    """
    place = find_machine(name)
    if tty:
        if timeout is not None:
            raise click.UsageError("--timeout is for commands without -t")
        status = on_terminal(place, words, user=user, cwd=cwd, env=env)
    else:
        status = with_streams(place, words, user=user, cwd=cwd, env=env, timeout=timeout, interactive=interactive)
    # Not a failure of ours, so no message: the command has written its own.
    sys.exit(status)


def with_streams(  # noqa: PLR0913 - what makes a command
    place: Kept,
    words: Sequence[str],
    *,
    user: str | None = None,
    cwd: str | None = None,
    env: Mapping[str, str],
    timeout: float | None = None,
    interactive: bool = False,
) -> int:
    """Run a command with the standard streams of this process, and return its exit status."""
    from pytest_vmbottle.result import CommandTimeout

    try:
        with streams(interactive=interactive) as descriptors:
            return exit_status(place.ask(request(words, user=user, cwd=cwd, env=env, timeout=timeout), descriptors))
    except CommandTimeout as error:
        say(f"the command did not end within {error.timeout:g} s and was killed")
        return _TIMED_OUT


def on_terminal(
    place: Kept, words: Sequence[str] = (), *, user: str | None = None, cwd: str | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Run a command, or a login shell, on this terminal, and return its exit status."""
    from pytest_vmbottle.machine.terminal import attach_to

    def opened(kind: str, size: tuple[int, int]) -> Terminal:
        return place.terminal(argv=words, user=user, cwd=cwd, env=env, kind=kind, size=size)

    # No deadline: the user ends it. None is that the user left it, which is no failure.
    return exit_status(attach_to(opened, welcome=not words) or 0)


@click.command(epilog=examples("vmbottle machine shell web", "vmbottle machine shell web -u nobody"))
@name_argument
@click.option("-u", "--user", help="User to log in as; by default the one of `machine start`.")
def shell(*, name: str, user: str | None) -> None:
    """Open a shell in a machine, on this terminal.

    Every key goes to the machine, Ctrl-C and Ctrl-D too, and so does the size of the window. Ctrl-] leaves, whatever the machine does. The
    exit status is that of the shell.
    """
    sys.exit(on_terminal(find_machine(name), user=user))


@click.command(
    epilog=examples(
        "vmbottle machine journal web", "vmbottle machine journal web -u nginx -n 20", "vmbottle machine journal web --since=-5min"
    )
)
@name_argument
@click.option("-u", "--unit", help="Only the messages of this unit.")
@click.option("--since", metavar="TIME", help="Only later messages; a time as `journalctl --since` takes it, such as -5min.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Show only this many of the last lines.")
@json_option
def journal(*, name: str, unit: str | None, since: str | None, lines: int | None, as_json: bool) -> None:
    """Show the journal of a machine's present boot."""
    text = ask(name, "journal", unit=unit, since=since, lines=lines)
    if as_json:
        emit({"name": name, "lines": text.splitlines()})
    else:
        click.echo(visible(text), nl=False)


@click.command(epilog=examples("vmbottle machine forward web 80", "curl http://$(vmbottle machine forward web 80)/"))
@name_argument
@click.argument("port", type=click.IntRange(1, 65535))
@json_option
def forward(*, name: str, port: int, as_json: bool) -> None:
    """Forward a TCP port of a running machine from this computer, and show the address that leads to it."""
    host, here = ask(name, "forward", port=port)
    if as_json:
        emit({"host": host, "port": here})
    else:
        click.echo(f"{host}:{here}")


@click.command(
    "ssh-config",
    epilog=examples(
        "vmbottle machine ssh-config web > cfg; ssh -F cfg web",
        "ssh -F $(vmbottle machine ssh-config --path web) web",
        'rsync -a -e "ssh -F $(vmbottle machine ssh-config --path web)" site/ web:/srv/',
        'ANSIBLE_SSH_COMMON_ARGS="-F $(vmbottle machine ssh-config --path web)" ansible all -i web, -m ping',
    ),
)
@name_argument
@click.option("--path", "only_path", is_flag=True, help="Show the path of its file instead, which is there as long as the machine runs.")
@json_option
def ssh_config(*, name: str, only_path: bool, as_json: bool) -> None:
    """Show an OpenSSH configuration for a machine.

    With it ssh, scp, rsync and Ansible reach the machine by its name.

    They log in as root, with the machine's own key, and only if it shows its own host key. The files of the keys are deleted when the
    machine is stopped.
    """
    path = ask(name, "ssh-config")
    text = Path(path).read_text()
    if as_json:
        emit({"host": name, "path": path, "text": text})
    else:
        click.echo(path if only_path else text, nl=only_path)


@click.command(epilog=examples("vmbottle machine screenshot web -o login.png", "vmbottle machine screenshot web -o - | display"))
@name_argument
@click.option("-o", "--output", required=True, metavar="FILE", help="File to write; - is standard output.")
def screenshot(*, name: str, output: str) -> None:
    """Save the screen of a machine that was started with --display, as PNG."""
    with sink(output) as fd:
        ask(name, "screenshot", (fd,))


@click.command(epilog=examples("vmbottle machine text web", "vmbottle machine text web --tty 1"))
@name_argument
@click.option(
    "--tty", type=click.IntRange(1, 63), metavar="NUMBER", help="Virtual terminal, in place of the screen; it needs no --display."
)
def text(*, name: str, tty: int | None) -> None:
    """Show the text on the screen of a machine that was started with --display, or on a virtual terminal of any.

    A screen is read by tesseract, which may take one character for another; what a terminal shows is exact.
    """
    click.echo(visible(ask(name, "text", tty=tty)))


@click.command(epilog=examples("vmbottle machine gdb web", 'gdb vmlinux -ex "target remote $(vmbottle machine gdb web)"'))
@name_argument
def gdb(*, name: str) -> None:
    """Have QEMU listen for a debugger of a machine's kernel, and show the path of the socket.

    The machine stands still while the debugger has it.
    """
    click.echo(ask(name, "gdb"))


@click.command(
    "send-keys",
    epilog=examples(
        "vmbottle machine send-keys web ctrl-alt-f2",
        "vmbottle machine send-keys web root ret",
        "vmbottle machine send-keys web --text 'echo home' ret",
    ),
)
@name_argument
@click.argument("keys", metavar="[KEY...]", nargs=-1)
@click.option("--text", help="Text to type first, as it is.")
def send_keys(*, name: str, keys: tuple[str, ...], text: str | None) -> None:
    """Press keys in a machine that was started with --display, one after the other.

    KEY is the name of a key (ret, f2, up), or names joined by dashes (ctrl-alt-f2). Anything else is text, typed on a US keyboard.
    """
    if not keys and not text:
        raise click.UsageError("name a key, or give --text")
    if text:
        ask(name, "type", text=text)
    if keys:
        ask(name, "keys", keys=keys)


@click.command(
    "send-console",
    epilog=examples("vmbottle machine send-console web root", "vmbottle machine send-console web --no-return $'\\x03'"),
)
@name_argument
@click.argument("text")
@click.option("--no-return", is_flag=True, help="Press no return key after the text.")
def send_console(*, name: str, text: str, no_return: bool) -> None:
    """Type text on the serial console of a machine, and press the return key.

    `console` shows what the machine answers.
    """
    ask(name, "send-console", text=text if no_return else f"{text}\n")


def _arguments(_: click.Context, __: click.Parameter, value: str) -> dict[str, Any]:
    try:
        arguments = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise click.BadParameter(f'{value!r} is not an object, such as \'{{"name": "nic"}}\'')
    return arguments


@click.command(
    epilog=examples(
        "vmbottle machine qmp web query-status",
        """vmbottle machine qmp web human-monitor-command '{"command-line": "info block"}'""",
    )
)
@name_argument
@click.argument("command")
@click.argument("arguments", metavar="[JSON]", default="{}", callback=_arguments)
def qmp(*, name: str, command: str, arguments: Mapping[str, Any]) -> None:
    """Run a command of QEMU's monitor protocol, and show its answer as JSON.

    The machine does not notice what it changes: see docs/machines.md.
    """
    emit(ask(name, "qmp", command=command, arguments=arguments))
