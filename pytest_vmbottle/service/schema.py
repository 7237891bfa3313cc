"""Requests and answers, as the OpenAPI document has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "MAX_LINES",
    "Action",
    "Command",
    "Created",
    "Entries",
    "Execution",
    "FileContent",
    "Files",
    "Folders",
    "Health",
    "Listing",
    "Machine",
    "Matches",
    "Metrics",
    "NewMachine",
    "Problem",
    "Reading",
    "Search",
    "Snapshot",
    "Upload",
    "Uploaded",
    "Written",
]

MAX_LINES = 10_000
_MAX_PATHS = 256

GuestPath = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$", examples=["/srv/site"])]
Paths = Annotated[list[GuestPath], Field(min_length=1, max_length=_MAX_PATHS)]
Mode = Annotated[
    Annotated[int, Field(ge=0, le=0o7777)] | Annotated[str, Field(pattern=r"^[0-7]{3,4}$")],
    Field(description="Permission bits: octal digits as a string, or a number.", examples=["0755"]),
]
User = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_.-]{0,31}\$?$", description="A user of the guest; by default the machine's.")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$", examples=["clean"])]


class _Request(BaseModel):
    # A misspelt member is an error, and no silent default.
    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """A refusal, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="What was attempted, what happened and what to do.")
    error: str | None = Field(default=None, description="The name of the error in Python, such as `SpecError`.")
    errors: list[dict[str, Any]] | None = Field(default=None, description="For an invalid request: each mistake, with its place.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"type": "about:blank", "title": "Not Found", "status": 404, "detail": "there is no machine 'web'"}],
        }
    )


class Health(BaseModel):
    """Sign of life."""

    ok: bool
    version: str
    node: str


class Machine(BaseModel):
    """A machine, by its record."""

    id: str = Field(description="Its name, which is unique in the catalog.", examples=["web"])
    name: str = Field(examples=["web"])
    state: Literal["provisioning", "running", "paused", "stopped", "off", "error"] = Field(
        description="`off`: the guest powered itself off. `error`: it could not be started, was lost, or its kernel is in trouble."
    )
    reason: str = Field(description="Why it does not run, or what its start is at; empty for a machine that runs.")
    node: str = Field(description="The computer that it is on.")
    base_image: str = Field(description="Its source.", examples=["debian-12"])
    since: float = Field(description="When it got into this state, in seconds since 1970.")
    until: float | None = Field(description="When it is ended, in seconds since 1970; null if it runs until it is stopped.")
    backend: str = Field(examples=["qemu"])
    arch: str | None = Field(examples=["x86_64"])
    vcpus: int | None
    mem_mib: int | None
    disk_gib: float | None
    user: str | None
    pid: int | None = Field(description="The process id of its hypervisor.")
    ports: dict[str, int] = Field(description="Ports of the guest, with those of 127.0.0.1 on the node that lead to them.")


class NewMachine(BaseModel):
    """A machine to be created. All other keywords of the `vm` mark can be given too, by their names."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"base_image": "debian-12", "name": "web", "vcpus": 2, "mem_mib": 2048, "ports": [80]}]},
    )

    base_image: str = Field(
        min_length=1,
        max_length=200,
        # No slash and no `::`, by which files are named: those of the service's computer are not the client's.
        pattern=r"^(pack:[0-9a-f]+|[A-Za-z0-9][A-Za-z0-9._-]*([:@][A-Za-z0-9][A-Za-z0-9._-]*)?)$",
        description="The name of an image, `pack:KEY`, or `MACHINE@LABEL`, a snapshot. No file of the service's computer can be named.",
        examples=["debian-12"],
    )
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,40}$", description="Its id; by default one after its source.")
    vcpus: int | None = Field(default=None, ge=1, le=64, description="Virtual processors.")
    mem_mib: int | None = Field(default=None, ge=16, le=1 << 22, description="RAM in MiB.")
    disk_gib: float | None = Field(default=None, gt=0, le=1 << 16, description="Size of its disk in GiB; by default the image's own.")
    timeout_boot_s: float | None = Field(default=None, gt=0, le=86400, description="Seconds within which it must be ready.")


class Action(_Request):
    """Something to do with a machine."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"action": "stop", "cleanup_disks": False}]})

    action: Literal["start", "stop", "reboot", "pause", "resume", "snapshot", "restore"]
    label: Label | None = Field(default=None, description="The snapshot, for `snapshot` and `restore`, and for a `start` from one.")
    cleanup_disks: bool = Field(default=False, description="For `stop`: remove its disk, from which it could start again.")
    now: bool = Field(default=False, description="For `stop`: cut the power.")

    @model_validator(mode="after")
    def _fits(self) -> Action:
        if self.action in ("snapshot", "restore") and self.label is None:
            raise ValueError(f"{self.action} takes a label")
        if self.label is not None and self.action not in ("snapshot", "restore", "start"):
            raise ValueError(f"{self.action} takes no label")
        if (self.cleanup_disks or self.now) and self.action != "stop":
            raise ValueError(f"{self.action} takes neither cleanup_disks nor now")
        return self


class Snapshot(BaseModel):
    """A saved state of a machine."""

    label: str
    created: float = Field(description="Seconds since 1970.")
    size: int = Field(description="Bytes on disk, of which some may be shared with others.")


class UploadedFile(_Request):
    """A file to be written, by its path in the destination."""

    path: str = Field(min_length=1, max_length=4096, description="Relative to `dest_path`, never outside it.", examples=["conf/site.conf"])
    text: str | None = Field(default=None, description="Its content as text.")
    content_b64: str | None = Field(default=None, description="Its content in base64.")
    mode: Mode | None = None

    @model_validator(mode="after")
    def _has_one_content(self) -> UploadedFile:
        if (self.text is None) == (self.content_b64 is None):
            raise ValueError("takes either text or content_b64")
        return self


class Upload(_Request):
    """Files for a folder of a guest: all of them are written, or none."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"dest_path": "/srv/site", "files": [{"path": "run.sh", "text": "#!/bin/sh\n", "mode": "0755"}]}]}
    )

    dest_path: GuestPath
    clean: bool = Field(default=False, description="Remove what else is in the folder.")
    files: list[UploadedFile] = Field(min_length=1, max_length=10_000)


class Uploaded(BaseModel):
    """Files that were uploaded."""

    dest_path: str
    files: int
    bytes: int


class Written(BaseModel):
    """A file that was written."""

    path: str
    bytes: int


class Listing(_Request):
    """Folders to be listed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"paths": ["/etc"], "depth": 1}]})

    paths: Paths
    depth: int | None = Field(default=1, ge=1, le=100, description="Levels of folders; null for all.")


class Entry(BaseModel):
    """Something in a folder."""

    path: str
    name: str
    type: Literal["file", "dir", "link", "other"]
    size: int | None = None
    mode: int | None = None
    mtime: float | None = None


class Entries(BaseModel):
    """Contents of folders."""

    entries: list[Entry]


class Reading(_Request):
    """Files to be read."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"paths": ["/etc/hostname"]}]})

    paths: Paths
    encoding: Literal["utf-8", "base64"] = Field(default="utf-8", description="The form of the answer: text, or bytes in base64.")
    ignore_errors: bool = Field(default=False, description="Leave out bytes that are no UTF-8; otherwise they are an error.")


class FileContent(BaseModel):
    """A file that was read."""

    path: str
    text: str | None = None
    content_b64: str | None = None


class Files(BaseModel):
    """Files that were read."""

    files: list[FileContent]


class Folders(_Request):
    """Folders to be made."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"paths": ["/srv/site/logs"]}]})

    paths: Paths
    parents: bool = Field(default=True, description="Make missing parents, and accept folders that are there.")


class Created(BaseModel):
    """Folders that were made."""

    paths: list[str]


class Search(_Request):
    """A text to be searched for in the files of a guest."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pattern": "listen 80", "root": "/etc", "include": ["*.conf"]}]})

    pattern: str = Field(min_length=1, max_length=4096)
    root: GuestPath
    regex: bool = False
    ignore_case: bool = False
    include: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default_factory=list, max_length=64)
    exclude_dirs: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default_factory=list, max_length=64)
    max_results: int = Field(default=500, ge=1, le=10_000)
    timeout: float = Field(default=10.0, gt=0, le=600, description="Seconds.")


class Match(BaseModel):
    """A line that was found."""

    path: str
    line: int
    text: str


class Matches(BaseModel):
    """Lines that were found."""

    matches: list[Match]
    truncated: bool = Field(description="There are more than `max_results`.")
    timed_out: bool


class Command(_Request):
    """A command for a guest."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"command": "uname -a"}]})

    command: str | None = Field(default=None, min_length=1, max_length=100_000, description="A text for `sh -eu -c`.")
    argv: list[str] | None = Field(default=None, min_length=1, max_length=1000, description="A program and its arguments, run as they are.")
    env: dict[str, str] = Field(default_factory=dict)
    cwd: GuestPath | None = None
    user: User | None = None
    stdin: str = Field(default="", description="Its whole input.")
    timeout: float = Field(default=60.0, gt=0, le=86400, description="Seconds until it is killed.")

    @model_validator(mode="after")
    def _is_one(self) -> Command:
        if (self.command is None) == (self.argv is None):
            raise ValueError("takes either command or argv")
        if any("\0" in text for text in (self.command or "", *(self.argv or ()), *self.env, *self.env.values())):
            raise ValueError("takes no NUL characters")
        return self

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return self.argv if self.argv is not None else ["sh", "-eu", "-c", self.command or ""]


class Execution(BaseModel):
    """A command that has ended."""

    returncode: int = Field(description="Its status, or -N for signal N.")
    stdout: str
    stderr: str
    truncated: bool = Field(description="More than 16 MiB came; only the first ones are here.")
    timed_out: bool = Field(description="It was killed at its time-out.")
    seconds: float


class Metrics(BaseModel):
    """Figures of a machine: its own process on the node, and, with `guest_`, those of the guest's kernel; null where unknown."""

    model_config = ConfigDict(extra="allow")

    id: str
    ts: float = Field(description="Seconds since 1970.")
    cpu_percent: float | None = Field(description="100 for one processor of the node.")
    rss_bytes: int | None
    rss_mib: float | None
    rss_human: str | None
    threads: int | None
    read_bytes: int | None
    write_bytes: int | None
