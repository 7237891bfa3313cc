"""An OpenSSH client configuration for one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.files import atomic_file

if TYPE_CHECKING:
    from pytest_vmbottle.backends.port import SshAccess

__all__ = ["write_config"]

# What ssh_config(5) calls them. Nothing of the user's own set-up is used: no agent, no other key, no other list of known hosts.
_CONFIG = """\
Host {alias}
  HostName {host}
  Port {port}
  User {user}
  IdentityFile {key}
  IdentitiesOnly yes
  IdentityAgent none
  CertificateFile none
  PreferredAuthentications publickey
  BatchMode yes
  HostKeyAlias {alias}
  HostKeyAlgorithms ssh-ed25519
  UserKnownHostsFile {known}
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  UpdateHostKeys no
  CheckHostIP no
  ForwardAgent no
  ForwardX11 no
  LogLevel ERROR
"""


def write_config(access: SshAccess, alias: str) -> Path:
    """Write the configuration file, with its key and known host beside it.

    Existing files are replaced.

    Args:
        access: Address, user and keys of the login.
        alias: The machine's name in the configuration.

    Raises:
        MachineError: OpenSSH cannot be given the path of the machine's folder.
    """
    config, key, known = (access.folder / name for name in ("ssh_config", "ssh_key", "ssh_known_hosts"))
    host, port = access.address
    text = _CONFIG.format(alias=alias, host=host, port=port, user=access.user, key=_quoted(key), known=_quoted(known))
    # The configuration comes last: who finds it finds the files that it names.
    contents = {key: access.keys.user_private, known: f"{alias} {access.keys.host_public}\n", config: text}
    for path, content in contents.items():
        with atomic_file(path) as file:
            file.write(content.encode())
    return config


def _quoted(path: Path) -> str:
    """Quote a path as one word of ssh_config.

    `%` begins a token there and `${` a variable, which nothing can quote.
    """
    text = str(path)
    if any(part in text for part in ('"', "\\", "\n", "${")):
        raise MachineError(f"OpenSSH cannot use files in {str(path.parent)!r}: choose another folder with --vm-catalog")
    return '"' + text.replace("%", "%%") + '"'
