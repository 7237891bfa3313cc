"""Errors as answers: `application/problem+json` (RFC 9457), in the words of our errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import attrs
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from pytest_vmbottle.errors import BackendUnavailable, CatalogError, MachineError, SpecError, VMBottleError
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.shown import printable

__all__ = ["MEDIA_TYPE", "Problem", "problem_of"]

MEDIA_TYPE = "application/problem+json"
# The first that fits counts. Never a status from 500 on for what a client or a guest can cause: those mean that the service is broken.
_STATUSES: tuple[tuple[type[BaseException], HTTPStatus], ...] = (
    (CommandTimeout, HTTPStatus.CONFLICT),
    (SpecError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (BackendUnavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (CatalogError, HTTPStatus.CONFLICT),
    (MachineError, HTTPStatus.CONFLICT),
    (FileNotFoundError, HTTPStatus.NOT_FOUND),
    (PermissionError, HTTPStatus.FORBIDDEN),
    (OSError, HTTPStatus.CONFLICT),
    (VMBottleError, HTTPStatus.CONFLICT),
    (ValueError, HTTPStatus.UNPROCESSABLE_ENTITY),
)
_log = logging.getLogger(__name__)


@attrs.frozen
class Problem(Exception):
    """A refusal of a request.

    Attributes:
        status: The HTTP status.
        detail: A sentence about it.
        error: The name of our error, if one is the cause.
        headers: Headers of the answer.
        more: Further members.
    """

    status: int
    detail: str
    error: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    more: Mapping[str, Any] = attrs.field(factory=dict)

    def __str__(self) -> str:
        return self.detail

    @property
    def members(self) -> dict[str, Any]:
        """The members of its JSON object."""
        about = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status, "detail": printable(self.detail)}
        return about | ({"error": self.error} if self.error else {}) | dict(self.more)

    @property
    def body(self) -> bytes:
        """Its JSON object as text, in ASCII: names in a guest may have surrogates, which cannot be encoded."""
        return json.dumps(self.members).encode()

    def response(self) -> Response:
        """Return it as an answer."""
        return Response(self.body, status_code=self.status, media_type=MEDIA_TYPE, headers=dict(self.headers))


def problem_of(error: BaseException) -> Problem:
    """Return an error as a refusal; one that is a mistake of ours is logged, and tells nothing of itself."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ClientDisconnect):  # nobody gets this answer
        return Problem(HTTPStatus.REQUEST_TIMEOUT, "the client hung up")
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return Problem(status, _words(error), type(error).__name__)
    _log.error("a request failed", exc_info=error)
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed; its log has the reason")


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error)
