"""The application: all routes behind the guard, with an OpenAPI document of their own names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.service import guests, pages, routes, schema
from pytest_vmbottle.service.bounds import Bounds
from pytest_vmbottle.service.figures import Scrape
from pytest_vmbottle.service.guard import Guard
from pytest_vmbottle.service.machines import Machines
from pytest_vmbottle.service.options import Options
from pytest_vmbottle.service.problems import MEDIA_TYPE, Problem, problem_of
from pytest_vmbottle.service.terminal import Terminals

__all__ = ["make_app", "openapi_of"]

_ABOUT = """Machines of one catalog: those of `vmbottle machine`, of tests that were kept, and of this service.

All routes but `/health` take `Authorization: Bearer TOKEN`. Errors are `application/problem+json` (RFC 9457).

A WebSocket at `/vms/{id}/tty?columns=80&rows=24` is a terminal in the guest. Its output comes in binary frames. What is sent is typed, but
for the text frames `ctrlc`, `ctrld` and `{"type": "resize", "columns": 80, "rows": 24}`."""
_DONE = {"200": "The answer.", "201": "It is there.", "202": "It is being started.", "204": "It is gone."}
_REFUSALS = {
    400: "The body is no JSON.",
    401: "The token is missing or wrong.",
    403: "The host or the origin is none of this service, or the guest does not permit it.",
    404: "There is no such machine, or no such file in it.",
    408: "The client was too slow.",
    409: "The state of the machine, or of its files, does not allow this.",
    413: "The body, or what was asked for, is too large.",
    422: "The request is invalid.",
    429: "Too many wrong tokens came from this address.",
    503: "The service is busy, or this computer cannot do it.",
}


def make_app(options: Options) -> ASGIApp:
    """Return the application."""
    app = _routed(options)
    # The guard is outermost: of a request without the token nothing else is looked at, and no more of it is read.
    return Guard(Bounds(app, max_upload=options.max_upload), options)


def openapi_of(options: Options) -> dict[str, Any]:
    """Return the OpenAPI document."""
    return _routed(options).openapi()


def _routed(options: Options) -> FastAPI:
    app = FastAPI(
        title="vmbottle",
        version=version("pytest-vmbottle"),
        lifespan=_lifespan,
        # Those of FastAPI load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # in `pages`
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.options = options
    app.openapi = lambda: _document(app)  # type: ignore[method-assign] # as FastAPI's documentation has it
    app.include_router(routes.health)
    for router in (routes.vms, guests.guests, routes.metrics):
        app.include_router(router)
    app.include_router(routes.sockets)
    app.include_router(pages.pages)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    # By their kinds too: what only `Exception` handles is a mistake of ours, and raised again after the answer, so that it is logged.
    for kind in (Problem, VMBottleError, OSError, ValueError, ClientDisconnect):
        app.add_exception_handler(kind, _failed)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Made here and not earlier: what they hold belongs to the event loop.
    machines = app.state.machines = Machines(app.state.options)
    app.state.scrape, app.state.terminals = Scrape(machines), Terminals()
    try:
        yield
    finally:
        await machines.starts.cancel_all()


# -- errors ----------------------------------------------------------------------------------------------------------------------------


async def _failed(_: Request, error: Exception) -> Response:
    return problem_of(error).response()


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - for mypy: it is registered for these alone
    return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    # Where and why, but not the input: it may have secrets, and would make the answer as large as the request.
    mistakes = [{"where": ".".join(map(str, each["loc"])), "message": each["msg"]} for each in error.errors()[:20]]
    words = "; ".join(f"{each['where']}: {each['message']}" for each in mistakes)
    # Of a body that is no JSON nothing is wrong but its form.
    status = HTTPStatus.BAD_REQUEST if any(each["type"] == "json_invalid" for each in error.errors()) else HTTPStatus.UNPROCESSABLE_ENTITY
    return Problem(status, words, more={"errors": mistakes}).response()


# -- the document ----------------------------------------------------------------------------------------------------------------------


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        schemas = document["components"]["schemas"]
        # FastAPI's own form of errors, which no route has.
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Problem"] = schema.Problem.model_json_schema()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _complete(operation, public=path == "/health")
        app.openapi_schema = document
    return app.openapi_schema


def _complete(operation: dict[str, Any], *, public: bool) -> None:
    """Add to an operation what the guard and the bounds answer in its place."""
    for status, words in _DONE.items():
        if (answer := operation["responses"].get(status)) and answer["description"] == "Successful Response":
            answer["description"] = words
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    refusals = {status: words for status, words in _REFUSALS.items() if not public or status in (403, 408, 413, 503)}
    operation["responses"] |= {str(status): {"description": words, "content": content} for status, words in refusals.items()}
    if public:
        operation["security"] = []
