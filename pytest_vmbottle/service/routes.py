"""Routes of machines: what there is, how it is made and ended, and figures of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse

from pytest_vmbottle.backends.console import Console
from pytest_vmbottle.channels.port import Terminal
from pytest_vmbottle.service.figures import Scrape, figures
from pytest_vmbottle.service.guard import send_problem
from pytest_vmbottle.service.machines import Machines
from pytest_vmbottle.service.problems import Problem, problem_of
from pytest_vmbottle.service.schema import MAX_LINES, Action, Health, Label, Machine, Metrics, NewMachine, Snapshot
from pytest_vmbottle.service.terminal import Terminals

__all__ = ["Ids", "Name", "health", "machines_of", "metrics", "sockets", "vms"]

_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,40}$"
Name = Annotated[str, Path(alias="id", pattern=_NAME, description="The machine's id.", examples=["web"])]
Ids = Annotated[
    str,
    Path(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,40}(,[A-Za-z][A-Za-z0-9_-]{0,40}){0,99}$", description="Ids with commas.", examples=["web,db"]),
]

health, sockets = APIRouter(tags=["service"]), APIRouter()
vms, metrics = APIRouter(prefix="/vms", tags=["machines"]), APIRouter(tags=["figures"])


def machines_of(request: Request | WebSocket) -> Machines:
    """Return the machines of the application that a request belongs to."""
    machines: Machines = request.app.state.machines
    return machines


@health.get("/health", summary="Tell that the service is there", response_model=Health)
async def get_health(request: Request) -> Any:
    """Answer without a token."""
    return {"ok": True, "version": version("pytest-vmbottle"), "node": request.app.state.options.node}


# -- machines --------------------------------------------------------------------------------------------------------------------------


@vms.get("/", summary="List the machines", response_model=list[Machine])
async def list_machines(request: Request) -> Any:
    """Machines of `vmbottle machine`, of tests that were kept, and of this service, sorted by name."""
    # As it is: to check what we have made ourselves takes longer than to make it.
    return JSONResponse(await machines_of(request).all())


@vms.post("/", status_code=202, summary="Create a machine", response_model=Machine)
async def create_machine(request: Request, response: Response, new: NewMachine) -> Any:
    """Answer at once, with the state `provisioning`. The machine is `running` when it is ready, or `error` with a reason."""
    made = await machines_of(request).create(new)
    response.headers["Location"] = f"/vms/{made['id']}"
    return made


@vms.get("/list/{ids}", summary="Show several machines", response_model=list[Machine])
async def get_machines(request: Request, ids: Ids) -> Any:
    """Machines in the order of their ids; it is an error if one of them is not there."""
    return [await machines_of(request).one(name) for name in ids.split(",")]


@vms.get("/{id}", summary="Show a machine", response_model=Machine)
async def get_machine(request: Request, name: Name) -> Any:
    """State, reason, node, ports and size of a machine."""
    return JSONResponse(await machines_of(request).one(name))


@vms.delete("/{id}", status_code=204, summary="Remove a machine")
async def delete_machine(request: Request, name: Name) -> None:
    """End it without a shutdown, and remove its disk, snapshots, console and record. A start that is under way is cancelled."""
    await machines_of(request).remove(name)


@vms.post("/{id}/actions", summary="Start, stop, pause, save or restore a machine", response_model=Machine)
async def act_on_machine(request: Request, name: Name, action: Action) -> Any:
    """Answer when it is done, but for `start`, which answers at once with the state `provisioning`."""
    return await machines_of(request).act(name, action)


@vms.get("/{id}/snapshots", summary="List the snapshots of a machine", response_model=list[Snapshot])
async def list_snapshots(request: Request, name: Name) -> Any:
    """Snapshots that `snapshot` made, oldest first, also of a machine that is off."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    return [{"label": each.label, "created": each.created, "size": each.size} for each in await machines.quick.run(kept.snapshots)]


@vms.delete("/{id}/snapshots/{label}", status_code=204, summary="Remove a snapshot")
async def delete_snapshot(request: Request, name: Name, label: Annotated[Label, Path()]) -> None:
    """Remove a snapshot from which no machine runs."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    if label not in {each.label for each in await machines.quick.run(kept.snapshots)}:
        raise Problem(404, f"the machine {name!r} has no snapshot {label!r}", "CatalogError")
    await machines.quick.run(lambda: kept.forget(label))


@vms.get("/{id}/console/tail", summary="Show the end of the serial console", response_class=PlainTextResponse)
async def tail_console(request: Request, name: Name, lines: Annotated[int, Query(ge=1, le=MAX_LINES)] = 100) -> Any:
    """Last lines of the console, also after the machine has ended. Control characters are shown as escapes."""
    machines = machines_of(request)
    kept = await machines.kept(name)
    return PlainTextResponse(await machines.quick.run(lambda: Console(kept.console).tail(lines)))


# -- figures ---------------------------------------------------------------------------------------------------------------------------


@metrics.get("/metrics", summary="Figures of all machines for Prometheus", response_class=PlainTextResponse)
async def scrape_metrics(request: Request) -> Any:
    """States of all machines, and figures of those that run, in Prometheus' text format."""
    scrape: Scrape = request.app.state.scrape
    return Response(await scrape.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@metrics.get("/metrics/{id}", summary="Figures of a machine", response_model=Metrics)
async def get_metrics(request: Request, name: Name, seconds: Annotated[float, Query(ge=0.05, le=60)] = 0.5) -> Any:
    """Its use of the node and, as `guest_`, its kernel's own figures. Use of processors is measured over a number of seconds."""
    machines = machines_of(request)
    return await figures(await machines.kept(name), machines, seconds=seconds)


# -- the terminal ----------------------------------------------------------------------------------------------------------------------


@sockets.websocket("/vms/{id}/tty")
async def open_terminal(  # noqa: PLR0913 - what makes a terminal
    socket: WebSocket,
    name: Name,
    *,
    user: Annotated[str | None, Query(pattern=r"^[a-z_][a-z0-9_.-]{0,31}\$?$")] = None,
    kind: Annotated[str, Query(pattern=r"^[a-z0-9][a-z0-9.+-]{0,40}$")] = "xterm-256color",
    columns: Annotated[int, Query(ge=1, le=1000)] = 80,
    rows: Annotated[int, Query(ge=1, le=1000)] = 24,
) -> None:
    """Serve a login shell in the guest; it ends with the socket."""
    terminals: Terminals = socket.app.state.terminals

    def opened() -> Terminal:
        return kept.terminal(user=user, kind=kind, size=(columns, rows))

    try:
        kept = await machines_of(socket).kept(name)
        await terminals.serve(socket, opened)
    except Exception as error:  # a WebSocket has no handlers of errors
        await send_problem(problem_of(error), socket.scope, socket.receive, socket.send)
