"""`vmbottle machine`: machines without pytest, which run until they are stopped."""

from __future__ import annotations

import click

from pytest_vmbottle.cli.groups import Group, Section

__all__ = ["machine"]

_SECTIONS = (
    Section(
        "Start",
        "machine_start",
        {
            "start": "Start a machine from SOURCE, or a stopped machine again.",
            "wait": "Wait until machines that are starting are ready; fail if one does not run.",
            "run": "Start a machine, run one command in it, and remove the machine.",
        },
    ),
    Section(
        "Commands",
        "machine_commands",
        {
            "exec": "Run a command in a machine.",
            "shell": "Open a shell in a machine, on this terminal.",
            "ssh-config": "Show an OpenSSH configuration for a machine.",
            "forward": "Forward a TCP port of a running machine from this computer, and show the address that leads to it.",
            "journal": "Show the journal of a machine's present boot.",
            "send-keys": "Press keys in a machine that was started with --display, one after the other.",
            "send-console": "Type text on the serial console of a machine, and press the return key.",
            "qmp": "Run a command of QEMU's monitor protocol, and show its answer as JSON.",
            "gdb": "Have QEMU listen for a debugger of a machine's kernel, and show the path of the socket.",
            "screenshot": "Save the screen of a machine that was started with --display, as PNG.",
            "text": "Show the text on the screen of a machine that was started with --display, or on a virtual terminal of any.",
        },
    ),
    Section(
        "Files",
        "machine_files",
        {
            "cp": "Copy a file or a tree to a machine, or from it; NAME:/PATH is the machine's side.",
            "read": "Write a file of a machine to standard output, byte for byte.",
            "ls-dir": "List the files in folders of a machine.",
            "search": "Search the files of a machine below ROOT for a PATTERN.",
            "upload": "Copy files and folders into the folder DEST of a machine, all of them or none.",
            "archive": "Pack a folder of a machine into a file.",
        },
    ),
    Section(
        "Facts",
        "machine_facts",
        {
            "ls": "List the machines, with the end of those that no longer run.",
            "show": "Show all that is known of a machine.",
            "console": "Show a machine's serial console, even if the machine has ended.",
            "metrics": "Show the use of this computer by a machine and, as `guest_`, its guest's own figures.",
            "argv": "Show the command line of the hypervisor that runs a machine.",
            "snapshots": "List the snapshots of a machine, oldest first, or remove some.",
        },
    ),
    Section(
        "Life",
        "machine_life",
        {
            "stop": "Shut machines down, and wait until they are off.",
            "rm": "Remove stopped machines, with their disks and snapshots.",
            "reboot": "Reboot machines, and wait until they are ready again.",
            "pause": "Stop the processors of machines; their clocks stand still until `resume`.",
            "resume": "Let paused machines go on.",
            "power-cut": "Cut the power of machines: their guests lose what they had not yet written to their disks.",
            "plug-disk": "Plug one more disk into a running machine, as /dev/disk/by-id/virtio-DISK.",
            "unplug-disk": "Pull a disk out of a running machine, with everything on it, as if by its cable.",
            "snapshot": "Save a running machine, with its RAM, under a LABEL.",
            "restore": "Set a machine back to one of its snapshots; a stopped one is started from it.",
        },
    ),
)


@click.group(
    cls=Group,
    later=_SECTIONS,
    epilog="\b\nExamples:\n  vmbottle machine start debian-12 --name web --port 80\n  vmbottle machine exec web systemctl status\n"
    "  vmbottle machine cp site/ web:/var/www/html\n  vmbottle machine shell web\n  vmbottle machine stop web\n"
    "  vmbottle machine start web",
)
def machine() -> None:
    """Machines without pytest, for trying things out by hand.

    They are cloned from the same packs as those of tests, so most start at once. A machine runs until it is stopped, even if the terminal
    is closed; all commands of the same user and catalog see it. It keeps its disk when it is stopped, until it is removed.

    `list`, `delete`, `logs` and `ssh` are other names of `ls`, `rm`, `console` and `shell`.
    """
