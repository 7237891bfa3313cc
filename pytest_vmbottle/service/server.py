"""The service as a process: sockets, TLS, bounds of connections, and its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.service.app import make_app
from pytest_vmbottle.service.options import Options

__all__ = ["serve"]

_CONNECTIONS = 512
_HEAD = 15.0
"""Seconds in which the head of a request must have come."""
_IDLE = 20
"""Seconds for which a connection without a request is kept."""
_GRACE = 10
"""Seconds for requests to end after SIGTERM; then they are cancelled."""
_FRAME = 1 << 20
"""Bytes of a WebSocket's message."""
_PING = 20.0


def serve(options: Options, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Machines run on; starts that are under way are cancelled, and leave nothing.

    Args:
        options: How to serve.
        ready: Function that gets the URL when connections are accepted.

    Raises:
        SpecError: The certificate cannot be used.
        OSError: The address cannot be listened on.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    config = _config(options)
    with _listening(options) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if options.certificate else 'http'}://{shown}:{port}/"
        _Server(config, lambda: ready(url)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that tells when it is ready: it handles signals from then on, and no request is refused."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def _config(options: Options) -> uvicorn.Config:
    config = uvicorn.Config(
        make_app(options),
        log_config=None,
        access_log=False,
        server_header=False,
        # The guard reads the only header of a proxy that counts.
        proxy_headers=False,
        # A guard of the last resort: its answer is no problem of ours, but the connection costs nothing.
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_GRACE,
        ws="websockets-sansio",
        ws_max_size=_FRAME,
        ws_ping_interval=_PING,
        ws_ping_timeout=_PING,
        ws_per_message_deflate=False,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise SpecError(f"--tls-cert {options.certificate}: {error}") from None
    config.http_protocol_class = _impatient(config.http_protocol_class)
    return config


def _listening(options: Options) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A service that is started again need not wait for the connections of the one before (TIME_WAIT in tcp(7)).
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{options.host}:{options.port}") from None
    return listener


def _impatient(protocol: Any) -> Any:
    """Return a protocol of uvicorn that hangs up on whoever does not send the head of a request in time, for which it has no bound."""

    class Impatient(_Impatience, protocol):  # type: ignore[misc] # it depends on what is installed
        pass

    return Impatient


class _Impatience:
    """The part of a protocol that waits for the head of a request, with the attributes that those of uvicorn have."""

    cycle: Any
    transport: asyncio.Transport
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        if not self._is_idle:
            self._stop()
        # Between two requests only a head that has begun is waited for; an idle connection has a bound of its own.
        elif self._late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)  # type: ignore[misc]

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _wait(self) -> None:
        self._late = asyncio.get_running_loop().call_later(_HEAD, self._hang_up)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        # After an upgrade the connection belongs to the WebSocket.
        owner: object = self.transport.get_protocol()
        if owner is self and self._is_idle:
            self.transport.close()
