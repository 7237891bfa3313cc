"""Pages of the service: its machines, and its routes. They load nothing from elsewhere."""

from __future__ import annotations

from http import HTTPStatus
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from pytest_vmbottle.service.problems import Problem

__all__ = ["pages"]

_KINDS = {"css": "text/css", "html": "text/html", "js": "text/javascript", "mjs": "text/javascript", "txt": "text/plain"}
_OWN = (
    "page.css",
    "page.js",
    "docs.js",
    "service.mjs",
    "xterm.css",
    "xterm.mjs",
    "addon-fit.mjs",
    "xterm.LICENSE.txt",
    "addon-fit.LICENSE.txt",
)
_OF_REPORTS = ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt")
"""Files that the report of a run has too."""
# Scripts of this service alone, none within a page. Styles may be: xterm.js makes elements of its own for the size of its cells. Frames of
# others are refused, in which a page could have its buttons clicked.
_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_FRESH = "no-cache"

pages = APIRouter(include_in_schema=False)


@pages.get("/")
async def get_page() -> Response:
    """Return the page of the machines, which holds nothing of them: its script asks for the token, and then for them."""
    return _file("pytest_vmbottle.service", "page.html")


@pages.get("/docs")
async def get_docs() -> Response:
    """Return the page of the routes, whose script reads the OpenAPI document."""
    return _file("pytest_vmbottle.service", "docs.html")


@pages.get("/openapi.json")
async def get_document(request: Request) -> Any:
    """Return the OpenAPI document."""
    return JSONResponse(request.app.openapi())


@pages.get("/page/{name}")
async def get_file(name: str) -> Response:
    """Return a file of the pages."""
    if name in _OWN:
        return _file("pytest_vmbottle.service", name)
    if name in _OF_REPORTS:
        return _file("pytest_vmbottle.report", name)
    raise Problem(HTTPStatus.NOT_FOUND, "the pages have no such file")


def _file(package: str, name: str) -> Response:
    data = (resources.files(package) / "page" / name).read_bytes()
    kind = _KINDS[name.rpartition(".")[2]]
    # The policy of a page holds for what it loads; the same one on all files costs nothing.
    return Response(data, media_type=kind, headers={"Content-Security-Policy": _POLICY, "Cache-Control": _FRESH})
