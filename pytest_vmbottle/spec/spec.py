"""Machine specs: checked keywords, layers, and their digests for the keys of packs."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import ipaddress
import json
import os
import re
import shlex
import stat
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import attrs

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.arch import ARCHITECTURES, host_arch
from pytest_vmbottle.host.digests import digest, sparse_digest
from pytest_vmbottle.host.sizes import format_size, parse_size

__all__ = [
    "BOOT",
    "POWER_IN_FIRST_BOOT",
    "SIGNATURE",
    "Layer",
    "MachineKeywords",
    "MachineSpec",
    "Source",
    "add_disks",
    "check_keywords",
    "disk_source",
    "ends_first_boot",
    "is_mode",
    "layer",
    "mistakes",
    "script_ends_first_boot",
]

_Choice = TypeVar("_Choice", bound=str)
Prepare = Callable[..., object]
Content = str | bytes | Path
File = Content | tuple[Content, int]
"""Content of a file, or a pair of content and permission bits."""


class MachineKeywords(TypedDict, total=False):
    """Keywords of the `vm` mark, of `layer` and of `vm_factory`; see `MachineSpec`."""

    name: str
    backend: str
    arch: str | None
    cpus: int
    cpu: str | None
    cpu_clock: Literal["host", "instructions"]
    nested: bool
    memory: int | str
    disk: int | str | None
    disks: Mapping[str, int | str | Path]
    track_writes: bool
    display: bool
    network: bool | str | Sequence[str]
    capture: bool
    ports: Iterable[int]
    packages: Iterable[str | Path]
    files: Mapping[str, File]
    shares: Mapping[str, str | Path]
    run: Iterable[str]
    user_data: Mapping[str, Any] | str | None
    kernel: str | Path | None
    initrd: str | Path | None
    cmdline: str | None
    append: str | None
    env: Mapping[str, str]
    user: str
    fresh: Literal["restore", "boot"]
    reset: Literal["none", "test"]
    timeout: float
    panic: Literal["fail", "expected"]


SIGNATURE = (
    "vm(source, *, name='vm', backend='auto', arch=None, cpus=1, cpu=None, cpu_clock='host', nested=False, memory='1G', disk=None, "
    "disks={}, track_writes=False, display=False, network=False, capture=False, ports=(), shares={}, packages=(), files={}, run=(), "
    "user_data=None, "
    "kernel=None, initrd=None, cmdline=None, append=None, env={}, user='root', fresh='restore', reset='none', timeout=120, panic='fail')"
)
# Keywords whose effect is saved in a pack on top of the source, so that its clones have them already.
PREPARATION = frozenset({"packages", "files", "run"})
# Keywords that decide what the guest boots with: the packs beneath a machine are made with the same.
_DIRECT = ("kernel", "initrd", "cmdline", "append")
BOOT = frozenset({"arch", "backend", "cpus", "cpu", "cpu_clock", "nested", "memory", "disk", "display", "user_data", *_DIRECT})

_NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
_HOST_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?")  # a label of RFC 1123
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# About what useradd(8) takes.
_USER_PATTERN = re.compile(r"[a-z_][a-z0-9_.-]{0,31}\$?")
# Strict, because the text becomes a part of QEMU's command line, where a comma begins another property.
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CPU_FEATURE = re.compile(r"[+-][a-z0-9][a-z0-9._-]{0,40}|[a-z0-9][a-z0-9._-]{0,40}=(on|off)")
# What cloud-init knows the kinds of user-data by (cloudinit/handlers/__init__.py, cloudinit/user_data.py).
_USER_DATA = re.compile(
    r"#cloud-config|#cloud-boothook|#include|#part-handler|#!|## template: *jinja|(?=.{0,4096}^mime-version:)[a-z-]+:",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
POWER_IN_FIRST_BOOT = (
    "would end the first boot before the guest is ready: leave it out, and call vm.reboot() or vm.shutdown() in a layer or in the test"
)
# A guess by the text, for an early error. A script that hides it runs into the time-out of the boot.
_ENDS_GUEST = re.compile(
    r"""(?:^|[;&|({`])[\s\-\["']*"""  # where a command begins, also as an entry of a list in YAML
    r"""(?:(?:sudo|exec|nohup|then|do|else|if|!|time|systemctl|(?:/\S*/)?(?:ba|da|k|z)?sh|-\S+|\w+=\S*)[\s"']+)*"""
    r"""(?:/\S*/)?(?:(?:reboot|poweroff|halt|shutdown|kexec)(?![\w.:=/-])|(?:tel)?init\s+[06]\b)|^power_state:""",
    re.MULTILINE,
)
# What no kernel cuts off: COMMAND_LINE_SIZE is 2048 on x86 and arm64, and an image has words of its own.
_MAX_WORDS = 1800
_PACKAGE_FILES = (".deb", ".rpm", ".apk")
_MAX_CPUS = 64
_MAX_MODE = 0o7777
_MAX_PORT = 65535
_MAX_DISKS = 6
"""Most disks beside the root disk: as many as every backend has ports for."""
_MAX_LANS = 4
"""Most private LANs of a machine."""
_MAX_PLUGGED = 6
"""Most private LANs and shared folders of a machine: as many as every backend has ports for."""
_SHARE_PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")
# A serial number of virtio has 20 bytes (VIRTIO_BLK_ID_BYTES), and udev makes a file name of it.
_DISK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
_MIB = 1 << 20  # QEMU rounds a machine's memory to pages; a file for it must have the very same size
_MIN_MEMORY = 16 * _MIB


def is_mode(value: object) -> bool:
    """Tell whether a value can be permission bits, as chmod(2) takes them."""
    return type(value) is int and 0 <= value <= _MAX_MODE


def _fail(keyword: str, value: object, takes: str) -> SpecError:
    return SpecError(f"{keyword}={value!r}: {takes}")


def _words(keyword: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _fail(keyword, value, "takes a list of strings")
    # Taken once: an iterator has nothing left the second time.
    words = tuple(value)
    if not all(isinstance(word, str) and word and "\0" not in word for word in words):
        raise _fail(keyword, value, "takes a list of non-empty strings")
    return words


def _ports(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _fail("ports", value, "takes a list of port numbers in the guest")
    ports = tuple(value)
    # `bool` is a subclass of `int`, so True would pass for port 1.
    if not all(isinstance(port, int) and not isinstance(port, bool) and 0 < port <= _MAX_PORT for port in ports):
        raise _fail("ports", value, f"takes port numbers from 1 to {_MAX_PORT}")
    return tuple(dict.fromkeys(ports))


def _cpus(value: object) -> int:
    # `bool` is a subclass of `int`, so True would pass for one processor.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_CPUS:
        raise _fail("cpus", value, f"takes a whole number from 1 to {_MAX_CPUS}")
    return value


def _cpu(value: object) -> str | None:
    if value is None:
        return None
    takes = "takes a CPU model of QEMU, then features to switch on or off: 'EPYC-v1,+svm,-avx2', 'max,la57=off', or a level, 'x86-64-v2'"
    if not isinstance(value, str):
        raise _fail("cpu", value, f"{takes}; did you mean 'cpus'?")
    # Names are not checked here: which models and features there are depends on the QEMU that starts the machine.
    model, *features = value.split(",")
    if not _CPU_MODEL.fullmatch(model):
        raise _fail("cpu", value, f"{takes}; {model!r} is not the name of a model")
    for feature in features:
        if not _CPU_FEATURE.fullmatch(feature):
            raise _fail("cpu", value, f"{takes}; {feature!r} is not a feature")
    return value


def _one_of(keyword: str, value: object, choices: tuple[_Choice, ...], takes: str) -> _Choice:
    for choice in choices:
        if value == choice:
            return choice
    raise _fail(keyword, value, takes)


def _cpu_clock(value: object) -> Literal["host", "instructions"]:
    takes = "takes 'host', or 'instructions' (time passes with the instructions that the processor has run)"
    return _one_of("cpu_clock", value, ("host", "instructions"), takes)


def _nested(value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail("nested", value, "takes True (the guest can run virtual machines by KVM) or False")
    return value


def _size(keyword: str, value: object) -> int:
    # Only the keyword's own message is of use, so that of the parser is dropped.
    if isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(SpecError):
            return parse_size(value)
    raise _fail(keyword, value, "takes a number of bytes above 0, or a string such as '512M' or '2G'")


def _arch(value: object) -> str:
    if value is None:
        return host_arch()
    if not isinstance(value, str):
        raise _fail("arch", value, "takes a string such as 'x86_64'")
    # Other systems say amd64 and arm64.
    arch = ARCHITECTURES.get(value, value)
    if arch not in ARCHITECTURES.values():
        raise _fail("arch", value, f"takes {' or '.join(repr(name) for name in ARCHITECTURES.values())}")
    return arch


def _network(value: object) -> bool | str | tuple[str, ...]:
    if isinstance(value, bool) or (isinstance(value, str) and _NAME_PATTERN.fullmatch(value)):
        return value
    if isinstance(value, list | tuple) and value:
        if all(isinstance(each, str) and _NAME_PATTERN.fullmatch(each) for each in value):
            return _lan_names(value)
        return tuple(_cidr(each) for each in value)
    takes = (
        "takes True (NAT), False (forwarded ports only), or the name of a private LAN: a letter, then letters, digits, - or _; "
        "or a list of several such names, or of the only networks that the guest may reach, such as ['10.0.0.0/8']"
    )
    raise _fail("network", value, takes)


def _lan_names(names: Sequence[str]) -> str | tuple[str, ...]:
    if len(set(names)) < len(names):
        raise _fail("network", names, "has the name of a private LAN twice")
    if len(names) > _MAX_LANS:
        raise _fail("network", names, f"takes at most {_MAX_LANS} private LANs")
    # In one spelling, so that equal networks give equal specs.
    return names[0] if len(names) == 1 else tuple(names)


def _cidr(value: object) -> str:
    with suppress(ValueError):
        if isinstance(value, str):
            # In one spelling, so that equal networks give equal specs. Bits of a host below the prefix are an error: they are mostly a
            # mistake.
            return str(ipaddress.ip_network(value))
    raise _fail("network", value, "is not a network: write its first address and the length of its prefix, such as '10.0.0.0/8'")


def _matching(keyword: str, value: object, pattern: re.Pattern[str], takes: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _fail(keyword, value, takes)
    return value


def _name(value: object) -> str:
    return _matching("name", value, _NAME_PATTERN, "takes a letter, then letters, digits, - or _")


def _backend(value: object) -> str:
    return _matching("backend", value, _NAME_PATTERN, "takes 'auto' or the name of a backend")


def _user(value: object) -> str:
    return _matching("user", value, _USER_PATTERN, "takes the name of a user in the guest")


def _memory(value: object) -> int:
    size = _size("memory", value)
    if size < _MIN_MEMORY:
        raise _fail("memory", value, "is less than 16 MiB: a number means bytes; write a string such as '512M'")
    # Rounded up: the guest gets at least what was asked for.
    return -(-size // _MIB) * _MIB


def _disk(value: object) -> int | None:
    if isinstance(value, Mapping):
        raise _fail("disk", value, "takes the size of the root disk; did you mean 'disks'?")
    return None if value is None else _size("disk", value)


def _disks(value: object) -> tuple[tuple[str, int | Path], ...]:
    # Also pairs, which is what this returns.
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004 - a pair
        raise _fail("disks", value, "takes a mapping from names to sizes such as '1G', or to the paths of disk images")
    found = [(name, disk_source(name, source)) for name, source in pairs]
    if len(found) > _MAX_DISKS:
        raise _fail("disks", [name for name, _ in found], f"takes at most {_MAX_DISKS} disks")
    return tuple(sorted(found, key=lambda pair: pair[0]))


def disk_source(name: object, source: object) -> int | Path:
    """Return what a disk beside the root disk is made from: its bytes, or the path of a disk image.

    Raises:
        SpecError: The name or the source is invalid.
    """
    if not isinstance(name, str) or not _DISK_NAME.fullmatch(name) or name == "root":
        raise _fail("disks", name, "is not the name of a disk: a letter, then at most 19 letters, digits, - or _; 'root' is the root disk")
    # A path is told from a size by its slash, since a file may be called 1G.
    if isinstance(source, Path) or (isinstance(source, str) and "/" in source):
        return Path(source).absolute()
    try:
        size = _size("disks", source)
    except SpecError:
        # With its name, since there may be several.
        raise _fail(
            "disks", {name: source}, "takes a size such as '512M' or '2G', or the path of a disk image, with a slash in it"
        ) from None
    if size < _MIB:
        raise _fail("disks", {name: source}, "is less than 1 MiB: a number means bytes; write a string such as '512M'")
    # Whole sectors, as every disk has.
    return -(-size // 512) * 512


def add_disks(below: Mapping[str, int | Path], own: object) -> dict[str, int | Path]:
    """Return the disks of a layer with those that are added to them.

    Args:
        below: The disks of the layer, which are in its pack.
        own: The keyword `disks` of what stands on it.

    Raises:
        SpecError: The keyword is invalid, or a disk of the layer would be another one.
    """
    added = dict(_disks(own))
    for name, source in added.items():
        there = below.get(name, source)
        if there != source:
            raise SpecError(f"disks={{{name!r}: {_shown(source)!r}}}: a layer has made this disk from {_shown(there)!r}; use another name")
    return {**below, **added}


def _shown(source: int | Path) -> str:
    return str(source) if isinstance(source, Path) else format_size(source)


def _track_writes(value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail("track_writes", value, "takes True (a power cut can take from the root disk what it had not flushed) or False")
    return value


def _display(value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail("display", value, "takes True (a screen and a keyboard) or False")
    return value


def _capture(value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail("capture", value, "takes True (record the traffic of its network cards) or False")
    return value


def _packages(value: object) -> tuple[str | Path, ...]:
    if isinstance(value, str | Path) or not isinstance(value, Iterable):
        raise _fail("packages", value, "takes a list of names, and of Paths of package files")
    # Taken once: an iterator has nothing left the second time.
    packages = tuple(value)
    for package in packages:
        # Never a string: one may come from another computer, which must not name files of this one.
        if isinstance(package, Path):
            if package.suffix not in _PACKAGE_FILES:
                raise _fail("packages", str(package), f"takes package files that end in {', '.join(_PACKAGE_FILES)}")
        else:
            _words("packages", [package])
    return packages


def _run(value: object) -> tuple[str, ...]:
    return _words("run", value)


def _fresh(value: object) -> Literal["restore", "boot"]:
    return _one_of("fresh", value, ("restore", "boot"), "takes 'restore' (clone a pack) or 'boot' (cold boot)")


def _reset(value: object) -> Literal["none", "test"]:
    return _one_of("reset", value, ("none", "test"), "takes 'none', or 'test' (a shared machine is fresh again for each test)")


def _panic(value: object) -> Literal["fail", "expected"]:
    takes = "takes 'fail' (a kernel in trouble fails the test) or 'expected' (it does not)"
    return _one_of("panic", value, ("fail", "expected"), takes)


def _timeout(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _fail("timeout", value, "takes a number of seconds above 0")
    return float(value)


def _env(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise _fail("env", value, "takes a mapping from names to strings")
    for name, content in value.items():
        if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
            raise _fail("env", name, "is not a name for an environment variable")
        if not isinstance(content, str) or "\0" in content:
            raise _fail("env", {name: content}, "takes strings without NUL bytes")
    # Sorted, so that equal mappings give equal specs.
    return tuple(sorted(value.items()))


def _files(value: object) -> tuple[tuple[str, File], ...]:
    if not isinstance(value, Mapping):
        raise _fail("files", value, "takes a mapping from absolute guest paths to text, bytes or a local Path")
    for path, content in value.items():
        # Refused and not normalised: `..` in a path that goes through a link means another file than it seems.
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts:
            raise _fail("files", path, "is not an absolute path in the guest")
        plain, mode = content if isinstance(content, tuple) and len(content) == 2 else (content, 0)  # noqa: PLR2004 - a pair
        if not isinstance(plain, str | bytes | Path):
            raise _fail("files", {path: content}, "takes text, bytes or a local Path, or a pair of one of these and permission bits")
        if not is_mode(mode):
            raise _fail("files", {path: content}, "takes permission bits as 0o755")
    # By the path alone: contents may be of kinds that do not compare with each other.
    return tuple(sorted(value.items(), key=lambda item: item[0]))


def _shares(value: object) -> tuple[tuple[str, Path], ...]:
    # Also pairs, which is what this returns.
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004 - a pair
        raise _fail("shares", value, "takes a mapping from absolute guest paths to folders of this computer")
    for path, folder in pairs:
        if not isinstance(path, str) or not _SHARE_PATH.fullmatch(path) or ".." in PurePosixPath(path).parts:
            raise _fail("shares", path, "is not the absolute path of a folder in the guest: letters, digits, and any of /._- are allowed")
        if not isinstance(folder, str | Path) or not str(folder):
            raise _fail("shares", {path: folder}, "takes a folder of this computer")
        # What separates options of the programs that share it.
        if any(character in str(folder) for character in ",\\\0\n"):
            raise _fail("shares", {path: folder}, "cannot share a folder whose path has a comma, a backslash or a newline in it")
    return tuple(sorted((path, Path(folder).absolute()) for path, folder in pairs))


def _user_data(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        # A guest that goes down in its first boot never becomes ready, which would show only at the time-out.
        ends = ends_first_boot(value)
        if ends:
            raise _fail("user_data", ends, POWER_IN_FIRST_BOOT)
        # JSON is YAML, and sorted keys make equal mappings equal.
        return "#cloud-config\n" + json.dumps(_plain(value), indent=1, sort_keys=True)
    if not isinstance(value, str) or not _USER_DATA.match(value):
        raise _fail(
            "user_data", value, "takes a mapping, or text that begins with a header of cloud-init: '#cloud-config', '#!/bin/sh', ..."
        )
    # For its error: a text with surrogates cannot be encoded.
    _plain(value)
    return value


def _plain(value: object, *place: object) -> object:
    """Return a value that JSON can write and YAML reads unchanged.

    `place` names its place in the whole, for errors.
    """
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            value.encode()
            return value
    # JSON has neither infinity nor NaN.
    elif isinstance(value, bool | int | None) or (isinstance(value, float) and isfinite(value)):
        return value
    elif isinstance(value, list | tuple):
        return [_plain(each, *place, index) for index, each in enumerate(value)]
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(_plain(key, *place)): _plain(each, *place, key) for key, each in value.items()}
    at = f"at {'.'.join(map(str, place))}: " if place else ""
    raise _fail(
        "user_data", value, f"{at}takes text, finite numbers, True, False, None, and lists and mappings of these, with text as keys"
    )


def ends_first_boot(config: Mapping[Any, Any]) -> str:
    """Return the entry of a cloud-config that would power off or reboot the guest before it is ready.

    Empty if there is none.
    """
    # Modules of cloud-init that end or reboot the guest by themselves.
    for key in ("power_state", "package_reboot_if_required"):
        if config.get(key):
            return key
    for key in ("bootcmd", "runcmd"):
        commands = config.get(key)
        for command in commands if isinstance(commands, list | tuple) else ():
            # cloud-init runs a string by a shell, and a list as the words of a command.
            script = shlex.join(map(str, command)) if isinstance(command, list | tuple) else str(command)
            if script_ends_first_boot(script):
                return f"{key}: {script}"
    return ""


def script_ends_first_boot(script: str) -> bool:
    """Tell whether a shell script has a command that powers off or reboots the guest."""
    return bool(_ENDS_GUEST.search(script))


def _boot_file(keyword: str, value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise _fail(keyword, value, "takes the path of a file on this computer")
    return Path(value).absolute()


def _kernel(value: object) -> Path | None:
    return _boot_file("kernel", value)


def _initrd(value: object) -> Path | None:
    return _boot_file("initrd", value)


def _kernel_words(keyword: str, value: object) -> str | None:
    if value is None:
        return None
    # Printable, since the kernel prints it on the console.
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value.encode()) > _MAX_WORDS:
        raise _fail(keyword, value, f"takes words for the kernel's command line, such as 'quiet loglevel=3', {_MAX_WORDS} bytes at most")
    return value


def _cmdline(value: object) -> str | None:
    return _kernel_words("cmdline", value)


def _append(value: object) -> str | None:
    return _kernel_words("append", value)


def _source(value: object) -> str | Path | Layer:
    if isinstance(value, Path | Layer) or (isinstance(value, str) and value):
        return value
    raise SpecError(f"source={value!r}: takes the name of an image, the path of a disk image, or a layer")


# Compared by identity: functions and keywords need not be comparable, and two layers of one name in two modules are two.
@attrs.frozen(kw_only=True, eq=False)
class Layer:
    """A recipe on top of an image or of another layer; made with the `layer` decorator.

    Attributes:
        source: The base: the name of an image, the path of a disk image, or another layer.
        function: The function that prepares the machine; None for the `packages`, `files` and `run` of a mark.
        keywords: Its spec keywords: defaults for machines cloned from it.
        depends: Files and folders whose contents count as part of the recipe.
        version: A number or text that is changed by hand to have the layer built again.
        name: The layer's name, for people.
    """

    source: str | Path | Layer
    function: Prepare | None
    keywords: Mapping[str, Any] = attrs.field(factory=dict)
    depends: tuple[Path, ...] = ()
    version: str = ""
    name: str = ""

    @property
    def chain(self) -> tuple[Layer, ...]:
        """The layers from the lowest one up to this one."""
        below = self.source.chain if isinstance(self.source, Layer) else ()
        return (*below, self)

    @property
    def disks(self) -> dict[str, int | Path]:
        """The disks beside the root disk, of the whole chain."""
        return add_disks(self.source.disks if isinstance(self.source, Layer) else {}, self.keywords.get("disks", {}))

    @property
    def image(self) -> str | Path:
        """The image at the bottom."""
        bottom = self.chain[0].source
        if isinstance(bottom, Layer):  # the chain ends where the source is no layer
            raise SpecError(f"the layer {self.name} has no image at its bottom")
        return bottom

    def recipe(self, *, skipped: Callable[[Path], object] = lambda _: None) -> str:
        """Return a digest of what this layer does, without its base.

        Args:
            skipped: Function that is called with what cannot be read as a file: sockets, FIFOs and devices.

        Raises:
            SpecError: The function's source or a file it depends on cannot be read.
        """
        # Contents and not times: a fresh checkout of the same files must find the packs of the one before.
        depends = [_content(path, skipped) for path in self.depends]
        disks = [(name, _image_content(source) if isinstance(source, Path) else source) for name, source in self.disks.items()]
        return digest(_function_source(self), depends, self.version, _prepared(self.keywords, skipped), disks)


def layer(
    source: str | Path | Layer, *, depends: Iterable[str | Path] = (), version: str | int = "", **keywords: Unpack[MachineKeywords]
) -> Callable[[Prepare], Layer]:
    """Turn a function that prepares a machine into a `Layer`.

    The function runs once; all tests and later runs clone the pack of its outcome.

    Args:
        source: An image's name, a disk image's path, or another layer.
        depends: Files and folders, relative to the function's own file, that the outcome depends on.
        version: Change it to have the layer built again if its source text is the same.
        keywords: Those of the `vm` mark; they hold while building and are the defaults for machines cloned from it.

    Raises:
        SpecError: A keyword is unknown or its value is invalid.
    """
    # Where the layer is defined, so that the error points there and not to a test.
    check_keywords({"source": source, **keywords}, signature=SIGNATURE.replace("vm(source, *", "layer(source, *, depends=(), version=''"))

    def decorate(function: Prepare) -> Layer:
        # Of the function's file: the current folder depends on how pytest was started.
        folder = Path(inspect.getfile(function)).parent
        return Layer(
            source=source,
            function=function,
            keywords=dict(keywords),
            depends=tuple(folder / path for path in depends),
            version=str(version),
            name=getattr(function, "__name__", "layer"),
        )

    return decorate


def _function_source(layer: Layer) -> str:
    if layer.function is None:
        return ""
    try:
        # Not the path of the source but its text: a project that moves keeps its packs.
        return textwrap.dedent(inspect.getsource(layer.function))
    except (OSError, TypeError) as error:
        raise SpecError(f"the source text of the layer {layer.name} cannot be read ({error}): define it in a file") from error


def _content(path: Path, skipped: Callable[[Path], object]) -> list[object]:
    """Return the content of a file or a tree: names, modes, data, and targets of links.

    The target of a link that is named itself is included, unless it does not exist or is a parent folder. Links in a tree are never
    followed, so that the walk ends.
    """
    try:
        # The name and not the path, so that a project that moves keeps its packs.
        found: list[object] = [_entry(path, path.name, skipped)]
        start = Path(os.path.realpath(path)) if path.is_symlink() else path  # resolve() raises for a circle of links
        if path.is_symlink():
            # A link to a folder above would make all of the project a part of the recipe, with what changes in it all the time.
            if not path.exists() or start in (path.parent.resolve(), *path.parent.resolve().parents):
                return found
            found.append(_entry(start, "", skipped))
        folders = [start] if start.is_dir() else []
        # A loop and no recursion: the depth of a tree is not limited by Python's stack.
        while folders:
            # Sorted, because file systems list their files in any order.
            for child in sorted(folders.pop().iterdir()):
                # Compiled files change without a change of the recipe.
                if child.name != "__pycache__":
                    found.append(_entry(child, str(child.relative_to(start)), skipped))
                    folders += [child] if child.is_dir() and not child.is_symlink() else []
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    return found


def _image_content(path: Path, kind: str = "disk image") -> str:
    """Return a digest of a disk image, or of another file."""
    try:
        status = path.stat()
        # What is no file cannot be read to its end; it is refused with more words when a disk is made from it.
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"{path} is not a {kind}: it is not a regular file")
        return _digest_of_image(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error


@cache
def _digest_of_image(path: Path, stamp: tuple[int, ...]) -> str:  # noqa: ARG001 - the file is read again when that has changed
    return sparse_digest(path)


def _entry(path: Path, name: str, skipped: Callable[[Path], object]) -> list[object]:
    """Return one file, folder or link, under our name for it."""
    # Not followed: a link is told by its target's name.
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        return [name, "link", str(path.readlink())]
    if kind == stat.S_IFDIR:
        return [name, "folder", stat.S_IMODE(status.st_mode)]
    if kind != stat.S_IFREG:
        skipped(path)
        # Reading a FIFO or a device could block for ever.
        return [name, "skipped"]
    return [name, "file", stat.S_IMODE(status.st_mode), _file_digest(path, status.st_size)]


def _file_digest(path: Path, size: int) -> str:
    """Return the sha256 of the first `size` bytes of a file.

    A file that grows meanwhile, or is replaced, does not make it read on for ever.
    """
    value = hashlib.sha256()
    # The file may have been replaced since `lstat`: O_NOFOLLOW refuses a link, and O_NONBLOCK keeps a FIFO from blocking (open(2)).
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 - opened already
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            value.update(chunk)
            size -= len(chunk)
    return value.hexdigest()


def _prepared(keywords: Mapping[str, Any], skipped: Callable[[Path], object]) -> list[object]:
    """Return the preparation keywords, with contents of local files in place of their paths."""

    def told(content: File) -> object:
        plain, mode = content if isinstance(content, tuple) else (content, None)
        came_to = _content(plain, skipped) if isinstance(plain, Path) else repr(plain)
        return came_to if mode is None else [came_to, mode]

    files = [(path, told(content)) for path, content in _files(keywords.get("files", {}))]
    packages = [_content(each, skipped) if isinstance(each, Path) else each for each in keywords.get("packages", ())]
    return [packages, files, list(keywords.get("run", ()))]


Source = str | Path | Layer


@attrs.frozen(kw_only=True)
class MachineSpec:
    """A machine's complete and checked description, from the `vm` mark and its defaults.

    Attributes:
        source: The name of an image, the path of a disk image, or a `Layer`.
        name: The machine's name in the test.
        backend: `"auto"` or the name of a backend.
        arch: The guest's architecture, as `uname -m` says it.
        cpus: Virtual processors.
        cpu: The model of its processors and their features, as QEMU's option `-cpu` takes them, or a level such as `"x86-64-v2"`; None for
            the best on this host.
        cpu_clock: What moves its clocks: `"host"`, the time of the host, or `"instructions"`, those that its processor has run.
        nested: Whether the guest can itself run virtual machines, by KVM.
        memory: Bytes of RAM.
        disk: Bytes of the root disk, or None for the image's own size.
        disks: Disks beside it by name: the bytes of one that is empty at first, or the path of a disk image.
        track_writes: Whether all writes to the root disk are written down, as those to `disks` are, so that a power cut can lose some.
        display: Whether the machine has a screen and a keyboard.
        network: True for NAT, False for forwarded ports only, the only networks (CIDR) that it may reach, or the name of a private LAN that
            the machines of one test share, or the names of several.
        capture: Whether the traffic of its network cards is recorded, for the artifacts of its test.
        ports: TCP ports in the guest that are forwarded from a free port on 127.0.0.1.
        shares: Folders of this computer that the guest has, too: its path for each, and the folder.
        packages: Packages installed beforehand, by their names or as files on this computer.
        files: Files written beforehand: guest path and content, or a pair of content and permission bits.
        run: Shell commands run beforehand, after packages and files.
        user_data: User data for cloud-init at the first boot, beside ours: a cloud-config, or another format that it knows.
        kernel: A kernel on this computer to boot in place of the image's; None for that.
        initrd: Its initial RAM disk; None for the image's with the image's kernel, and for none with another one.
        cmdline: The kernel's command line; None for the image's.
        append: Words to add to it.
        env: Environment variables of every command.
        user: The user who runs commands.
        fresh: `"restore"` clones a pack, `"boot"` boots cold.
        timeout: Seconds within which the machine must be ready, before factors.
        panic: `"fail"` fails a test whose guest's kernel panics, reports a bug of its own or a hung task; `"expected"` does not.
    """

    source: Source = attrs.field(converter=_source)
    name: str = attrs.field(default="vm", converter=_name)
    backend: str = attrs.field(default="auto", converter=_backend)
    arch: str = attrs.field(default=None, converter=_arch)
    cpus: int = attrs.field(default=1, converter=_cpus)
    cpu: str | None = attrs.field(default=None, converter=_cpu)
    cpu_clock: Literal["host", "instructions"] = attrs.field(default="host", converter=_cpu_clock)
    nested: bool = attrs.field(default=False, converter=_nested)
    memory: int = attrs.field(default=1 << 30, converter=_memory)
    disk: int | None = attrs.field(default=None, converter=_disk)
    disks: tuple[tuple[str, int | Path], ...] = attrs.field(factory=dict, converter=_disks)
    track_writes: bool = attrs.field(default=False, converter=_track_writes)
    display: bool = attrs.field(default=False, converter=_display)
    network: bool | str | tuple[str, ...] = attrs.field(default=False, converter=_network)
    capture: bool = attrs.field(default=False, converter=_capture)
    ports: tuple[int, ...] = attrs.field(default=(), converter=_ports)
    shares: tuple[tuple[str, Path], ...] = attrs.field(factory=dict, converter=_shares)
    packages: tuple[str | Path, ...] = attrs.field(default=(), converter=_packages)
    files: tuple[tuple[str, File], ...] = attrs.field(factory=dict, converter=_files)
    run: tuple[str, ...] = attrs.field(default=(), converter=_run)
    user_data: str | None = attrs.field(default=None, converter=_user_data)
    kernel: Path | None = attrs.field(default=None, converter=_kernel)
    initrd: Path | None = attrs.field(default=None, converter=_initrd)
    cmdline: str | None = attrs.field(default=None, converter=_cmdline)
    append: str | None = attrs.field(default=None, converter=_append)
    env: tuple[tuple[str, str], ...] = attrs.field(factory=dict, converter=_env)
    user: str = attrs.field(default="root", converter=_user)
    fresh: Literal["restore", "boot"] = attrs.field(default="restore", converter=_fresh)
    reset: Literal["none", "test"] = attrs.field(default="none", converter=_reset)
    timeout: float = attrs.field(default=120.0, converter=_timeout)
    panic: Literal["fail", "expected"] = attrs.field(default="fail", converter=_panic)

    def __attrs_post_init__(self) -> None:
        """Check rules that concern several keywords."""
        # After the converters, each of which has seen its own keyword only.
        wrong = []
        if self.lans and (not _HOST_NAME.fullmatch(self.name) or self.name.lower() == "localhost"):
            takes = f"is not a host name, and a machine on the LAN {self.lans[0]!r} needs one: use letters, digits and dashes"
            wrong.append(_fail("name", self.name, takes))
        if len(self.lans) + len(self.shares) > _MAX_PLUGGED:
            wrong.append(_fail("shares", [path for path, _ in self.shares], f"takes, with private LANs, at most {_MAX_PLUGGED} in all"))
        if self.nested and self.arch != "x86_64":
            takes = f"works only in x86_64 guests, and this guest is {self.arch}: write arch='x86_64'"
            wrong.append(_fail("nested", self.nested, takes))
        if self.cpu_clock == "instructions" and (self.cpus > 1 or self.nested):
            takes = "counts the instructions of one processor, without virtual machines in the guest: leave out cpus= and nested="
            wrong.append(_fail("cpu_clock", self.cpu_clock, takes))
        if wrong:
            raise SpecError("\n  ".join(map(str, wrong)))

    @property
    def nat(self) -> bool:
        """Tell whether the guest reaches the host's network."""
        # With `is`: the name of a LAN and a list of networks are true, too.
        return self.network is True

    @property
    def lans(self) -> tuple[str, ...]:
        """The names of the machine's private LANs."""
        if isinstance(self.network, tuple):
            return () if self.networks else self.network
        return (self.network,) if isinstance(self.network, str) else ()

    @property
    def networks(self) -> tuple[str, ...]:
        """The only networks that it may reach (CIDR); empty if it is not said so."""
        # A name has no slash, and a network always has one here.
        return self.network if isinstance(self.network, tuple) and "/" in self.network[0] else ()

    @classmethod
    def resolve(cls, source: Source, keywords: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> MachineSpec:
        """Make a spec of keywords, the source's layers and the defaults, in this order of precedence.

        Raises:
            SpecError: A keyword is unknown or its value is invalid.
        """
        # From the farthest to the nearest, so that each update overwrites what counts less.
        merged = dict(defaults or {})
        for below in source.chain if isinstance(source, Layer) else ():
            # Preparation belongs to the layer that names it; a layer above would otherwise do it again.
            merged.update({key: value for key, value in below.keywords.items() if key not in PREPARATION | {"disks"}})
        merged.update(keywords)
        check_keywords(merged)
        # The disks of layers are in their packs, so a mark adds to them.
        merged["disks"] = add_disks(source.disks if isinstance(source, Layer) else {}, merged.get("disks", {}))
        # The source that was given, and not one of the defaults or a layer.
        return cls(**{**merged, "source": source})

    def but(self, **keywords: Any) -> MachineSpec:
        """Return this spec with other values for some keywords.

        Raises:
            SpecError: A value is invalid.
        """
        # `env` and `files` are pairs in a spec, but their converters take mappings.
        return attrs.evolve(self, **{"env": dict(self.env), "files": dict(self.files), **keywords})

    def plain_keywords(self) -> dict[str, Any]:
        """Return the keywords that make this spec again, as JSON has them, without what a disk has of it already: `PREPARATION`.

        The source is the image, in place of layers, whose functions only their own project has.
        """
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(MachineSpec) if field.name not in PREPARATION}
        plain = {key: _plain_value(value) for key, value in fields.items()}
        disks = {name: str(source) if isinstance(source, Path) else source for name, source in self.disks}
        shares = {path: str(folder) for path, folder in self.shares}
        return plain | {"source": str(self.image), "env": dict(self.env), "disks": disks, "shares": shares}

    @property
    def image(self) -> str | Path:
        """The image at the bottom of the source."""
        return self.source.image if isinstance(self.source, Layer) else self.source

    @property
    def steps(self) -> tuple[Layer, ...]:
        """The layers to build on the image, lowest first; the preparation keywords of the spec itself come last."""
        below = self.source.chain if isinstance(self.source, Layer) else ()
        own: dict[str, Any] = {"packages": self.packages, "files": dict(self.files), "run": self.run}
        # No empty step: it would be a pack of its own with the same content.
        if not any(own.values()):
            return below
        # With the disks, which commands may want to format.
        return (*below, Layer(source=self.source, function=None, keywords={**own, "disks": dict(self.disks)}, name="prepared"))

    def boot_digest(self) -> str:
        """Return a digest of everything that a guest is booted with.

        Specs with the same digest can share a pack of the bare image.
        """
        # Sorted, since the order of a frozenset differs from process to process. Only those that are given of the last ones: packs from
        # before there were any stay what they are.
        return digest(sorted((key, getattr(self, key)) for key in BOOT.difference(_DIRECT)), *self._direct())

    def _direct(self) -> list[tuple[str, str]]:
        """Return what is booted directly, with the content of files in place of their paths: they are built again and again."""
        given = [(key, getattr(self, key)) for key in _DIRECT]
        return [(key, _image_content(value, key) if isinstance(value, Path) else value) for key, value in given if value is not None]


def _plain_value(value: object) -> object:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def check_keywords(keywords: Mapping[str, Any], *, signature: str = SIGNATURE) -> None:
    """Check names and values of spec keywords.

    Raises:
        SpecError: It lists all mistakes: the keyword, what it takes, and a suggestion for a misspelt name.
    """
    # All mistakes at once, so that they can be mended together.
    wrong = mistakes(keywords)
    if wrong:
        raise SpecError("\n  ".join([*wrong, f"the signature is {signature}"]))


def mistakes(keywords: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each mistake in spec keywords, with or without a source."""
    fields = {field.name: field for field in attrs.fields(MachineSpec)}
    wrong = []
    for keyword, value in keywords.items():
        if keyword not in fields:
            near = difflib.get_close_matches(keyword, fields, n=1)
            wrong.append(f"unknown keyword {keyword!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        else:
            # The converter is what `MachineSpec` itself uses, so there is one place that says what a keyword takes.
            wrong += _refusals(fields[keyword].converter, value)
    # Each keyword alone first: rules about several are checked only if each is valid.
    return wrong or _refusals(lambda value: MachineSpec(**value), {"source": "checked", **keywords})


def _refusals(check: Any, value: object) -> list[str]:
    try:
        check(value)
    except SpecError as error:
        return [str(error)]
    return []
