"""Routes into a guest: files, searches and commands."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from pytest_vmbottle.service.downloads import Streamed, download, read_bounded, type_of
from pytest_vmbottle.service.execution import Executions
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.service.routes import Name, machines_of
from pytest_vmbottle.service.schema import (
    Command,
    Created,
    Entries,
    Execution,
    Files,
    Folders,
    GuestPath,
    Listing,
    Matches,
    Mode,
    Reading,
    Search,
    Upload,
    Uploaded,
    User,
    Written,
)
from pytest_vmbottle.service.staging import fill, mode_of, spooled, staging
from pytest_vmbottle.service.uploads import write_file

__all__ = ["guests"]

_MAX_READ = 16 << 20
"""Bytes of all files of one answer, which is held in memory."""
_TYPES = {"file": "file", "dir": "dir", "directory": "dir", "link": "link", "symlink": "link"}
_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
_FORMATS = {"tar.gz": "application/gzip", "zip": "application/zip"}
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_TEXT = {"schema": {"type": "string"}}

_T = TypeVar("_T")

guests = APIRouter(prefix="/vms/{id}", tags=["guests"])
GuestFile = Annotated[GuestPath, Query(description="An absolute path in the guest.")]


async def _ask(request: Request, name: str, order: Mapping[str, Any]) -> Any:
    machines = machines_of(request)
    kept = await machines.kept(name)
    return await machines.long.run(partial(kept.ask, order))


# -- to the guest ----------------------------------------------------------------------------------------------------------------------


@guests.post("/upload-files", status_code=201, summary="Write files into a folder", response_model=Uploaded)
async def upload_files(request: Request, name: Name, upload: Upload) -> Any:
    """Write all files or none, and nothing outside `dest_path`. Large ones go better by `PUT /vms/{id}/files`."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    # Held here and not in a thread, which does not end with the service: nothing is left of it then.
    with staging() as folder:
        size = await machines.quick.run(lambda: fill(folder, upload.files))
        order = {"verb": "upload", "src": str(folder), "dest": upload.dest_path, "clean": upload.clean}
        await machines.long.run(lambda: kept.ask(order))
    return {"dest_path": upload.dest_path, "files": len(upload.files), "bytes": size}


@guests.put(
    "/files",
    summary="Write a file",
    response_model=Written,
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
)
async def put_file(
    request: Request,
    name: Name,
    path: GuestFile,
    mode: Annotated[Mode | None, Query()] = None,
    owner: Annotated[User | None, Query()] = None,
) -> Any:
    """Write the body, as it is, to a file. Nothing is written unless all of it has come."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    async with spooled(request.stream()) as source:
        write = partial(write_file, kept, source, path, mode=mode_of(mode), owner=owner)
        written = await machines.long.run(write)
    return {"path": path, "bytes": written}


@guests.post("/create-dir", status_code=201, summary="Make folders", response_model=Created)
async def create_dir(request: Request, name: Name, folders: Folders) -> Any:
    """Make folders, with their parents."""
    await _ask(request, name, {"verb": "mkdir", "paths": folders.paths, "parents": folders.parents})
    return {"paths": folders.paths}


# -- from the guest --------------------------------------------------------------------------------------------------------------------


@guests.post("/list-dirs", summary="List folders", response_model=Entries)
async def list_dirs(request: Request, name: Name, listing: Listing) -> Any:
    """Everything in the folders, to a depth."""
    found = await _ask(request, name, {"verb": "list", "paths": listing.paths, "depth": listing.depth})
    return {"entries": [{"name": PurePosixPath(each["path"]).name, **each, "type": _TYPES.get(each["type"], "other")} for each in found]}


@guests.post("/read-file", summary="Read files", response_model=Files, response_model_exclude_none=True)
async def read_file(request: Request, name: Name, reading: Reading) -> Any:
    """Contents of files that have no more than 16 MiB together; larger ones are there to download."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    room, files = _MAX_READ, []
    for path in reading.paths:
        data = await read_bounded(kept, path, machines.long, room)
        if data is None:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{path}: more than {_MAX_READ} bytes in all; use download-file")
        room -= len(data)
        files.append({"path": path, **_content(path, data, reading)})
    return {"files": files}


def _content(path: str, data: bytes, reading: Reading) -> dict[str, str]:
    if reading.encoding == "base64":
        return {"content_b64": base64.b64encode(data).decode()}
    try:
        return {"text": data.decode("utf-8", "ignore" if reading.ignore_errors else "strict")}
    except UnicodeDecodeError as error:
        wrong = f"{path}: the byte at {error.start} is no UTF-8; read it with ignore_errors, as base64, or download it"
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, wrong, "UnicodeDecodeError") from None


@guests.get(
    "/download-file",
    summary="Download a file",
    response_class=StreamingResponse,
    responses={200: {"description": "The file.", "content": _BINARY}},
)
async def download_file(request: Request, name: Name, path: GuestFile) -> Streamed:
    """A file of any size, in pieces, with the type that its name says."""
    machines = machines_of(request)
    order = {"verb": "read", "path": path}
    return await download(await machines.kept(name), order, machines.long, name=PurePosixPath(path).name, media_type=type_of(path))


@guests.get(
    "/download-folder",
    summary="Download a folder as an archive",
    response_class=StreamingResponse,
    responses={200: {"description": "The archive.", "content": dict.fromkeys(_FORMATS.values(), _BINARY["application/octet-stream"])}},
)
async def download_folder(request: Request, name: Name, path: GuestFile, prefer_fmt: Literal["tar.gz", "zip"] = "tar.gz") -> Streamed:
    """A folder of any size, in pieces."""
    machines = machines_of(request)
    order = {"verb": "archive", "root": path, "format": prefer_fmt}
    saved = f"{PurePosixPath(path).name or name}.{prefer_fmt}"
    return await download(await machines.kept(name), order, machines.long, name=saved, media_type=_FORMATS[prefer_fmt])


# -- searches and commands -------------------------------------------------------------------------------------------------------------


@guests.post(
    "/search",
    summary="Search files for a text",
    response_model=Matches,
    responses={200: {"description": "The matches; as lines of JSON with `Accept: application/x-ndjson`.", "content": {_LINES: _TEXT}}},
)
async def search(request: Request, name: Name, search: Search) -> Any:
    """Lines of files below a folder that have a text, or match a regular expression."""
    found = await _ask(request, name, {"verb": "search", **search.model_dump()})
    if _wants(request, _LINES):
        return Streamed(_lines(found), media_type=_LINES)
    return found


async def _lines(found: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
    for match in found["matches"]:
        yield json.dumps(match).encode() + b"\n"
    yield json.dumps({key: found[key] for key in ("truncated", "timed_out")}).encode() + b"\n"


@guests.post(
    "/execute-sh",
    summary="Run a command",
    response_model=Execution,
    responses={200: {"description": "Its outcome; events while it runs with `Accept: text/event-stream`.", "content": {_EVENTS: _TEXT}}},
)
async def execute_sh(request: Request, name: Name, command: Command) -> Any:
    """Run a command to its end, or its time-out. If the client hangs up, it ends too."""
    machines = machines_of(request)
    executions = Executions(await machines.kept(name), machines.long)
    if _wants(request, _EVENTS):
        return Streamed(executions.events(command), media_type=_EVENTS)
    return await _while_connected(request, executions.whole(command))


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await something as long as the client is there, and cancel it when it hangs up."""
    doing, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([doing, gone], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Problem(HTTPStatus.REQUEST_TIMEOUT, "the client hung up")
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _wants(request: Request, kind: str) -> bool:
    return kind in request.headers.get("accept", "")
