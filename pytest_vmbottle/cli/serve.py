"""`vmbottle serve`: machines over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from pytest_vmbottle.cli.command import Cannot, as_size, catalog_root, examples, say, setting_options
from pytest_vmbottle.errors import SpecError

__all__ = ["serve"]

_PREFIX = "VMBOTTLE_SERVE_"
_NEEDED = ("fastapi", "uvicorn", "websockets")


_Command = Callable[..., None]


def _option(name: str, words: str, **kinds: Any) -> Callable[[_Command], _Command]:
    """Return an option that can be given by its variable of the environment too."""
    variable = f"{_PREFIX}{name.upper().replace('-', '_')}"
    return click.option(f"--{name}", envvar=variable, help=f"{words}; also {variable}.", **kinds)


_file = click.Path(path_type=Path, dir_okay=False)


@click.command(
    epilog=examples(
        "vmbottle serve",
        "vmbottle serve --port 8080 --token-file token",
        "vmbottle serve --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key key.pem",
        'curl -H "Authorization: Bearer $(cat token)" http://127.0.0.1:8080/vms/',
    )
)
@_option("host", "Address to listen on", default="127.0.0.1", show_default=True)
@_option("port", "TCP port; 0 for a free one", type=click.IntRange(0, 65535), default=8080, show_default=True)
@_option("token-file", "File with the token of clients, for this user only; by default the catalog's own, made if need be", type=_file)
@_option("tls-cert", "TLS certificate, with its chain, in PEM", type=_file)
@_option("tls-key", "Its private key in PEM, if it is in another file", type=_file)
@_option("behind-proxy", "A proxy speaks TLS, and nobody else reaches this port", is_flag=True)
@_option("allow-host", "Name by which clients call the service, beside this computer's own", multiple=True, metavar="NAME")
@_option("node", "Name of this computer in answers; by default its own", default=socket.gethostname, metavar="NAME")
@_option("max-upload", "Size of an uploaded file at most", callback=as_size, metavar="SIZE", default="1G", show_default=True)
@_option("max-starts", "Machines that start at the same time; others wait", type=click.IntRange(1, 64), default=4, show_default=True)
@_option("max-machines", "Machines up to which new ones are made", type=click.IntRange(1, 10_000), default=200, show_default=True)
@setting_options()
def serve(*, settings: Mapping[str, str], token_file: Path | None, **given: Any) -> None:
    """Serve the machines of this catalog over HTTP.

    They are those of `vmbottle machine`, of tests that were kept, and those that clients create. They run on when the service ends, and it
    finds them again when it is started. Whoever has the token can do with them whatever this user can.

    The service's URL is written to stdout when it is ready. Its routes are shown at /docs, its machines at /.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Cannot(f"{', '.join(missing)} is not installed, which the service needs. Install it: pip install 'pytest-vmbottle[serve]'")
    from pytest_vmbottle.service import server
    from pytest_vmbottle.service.options import Options, is_loopback, made_token, read_token

    root = catalog_root()
    try:
        if token_file is None:
            if not is_loopback(given["host"]):
                raise SpecError(f"--host {given['host']} can be reached from other computers: give a token with --token-file")
            token_file = made_token(root)
            say(f"The token is in {token_file}")
        given |= {"certificate": given.pop("tls_cert"), "key": given.pop("tls_key"), "allowed_hosts": given.pop("allow_host")}
        options = Options(root=root, token=read_token(token_file), settings=settings, **given)
        server.serve(options, click.echo)
    except SpecError as error:
        raise click.UsageError(str(error)) from None
