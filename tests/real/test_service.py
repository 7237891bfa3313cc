"""`vmbottle serve`: a real machine over HTTP, by clients of other libraries."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import websocket

from pytest_vmbottle.host.deadline import Deadline
from tests.service.running import PATIENCE, Service, environment, serving

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the token and the log."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(vm_catalog: Catalog, folder: Path) -> Iterator[Service]:
    with serving(vm_catalog.root, folder) as running:
        yield running


@pytest.fixture(scope="module")
def web(service: Service) -> Iterator[str]:
    """A machine that was created over HTTP."""
    name = f"service{os.getpid()}"
    made = service.post("/vms/", {"base_image": "debian-12", "name": name, "vcpus": 1, "mem_mib": 1024, "ports": [8000]}, 202)
    assert (made["id"], made["state"]) == (name, "provisioning")
    service.wait(name, "running")
    yield name
    assert service.ask("DELETE", f"/vms/{name}").status == 204
    assert service.get(f"/vms/{name}").status == 404


def pgrep(service: Service, name: str, pattern: str) -> bool:
    return bool(service.post(f"/vms/{name}/execute-sh", {"argv": ["pgrep", "-f", pattern]})["returncode"] == 0)


# -- the machine -----------------------------------------------------------------------------------------------------------------------


def test_a_created_machine_is_one_of_the_commands_too(service: Service, web: str, vm_catalog: Catalog) -> None:
    shown = service.get(f"/vms/{web}").json
    listed = service.get("/vms/").json
    several = service.get(f"/vms/list/{web},{web}").json
    command = [*service.process.args[:4], "--catalog", str(vm_catalog.root), "machine", "exec", web, "--", "uname"]  # type: ignore[index]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)

    assert shown in listed
    assert several == [shown, shown]
    assert (shown["state"], shown["reason"], shown["base_image"], shown["mem_mib"], shown["vcpus"]) == ("running", "", "debian-12", 1024, 1)
    assert list(shown["ports"]) == ["8000"]
    assert ended.stdout == "Linux\n"


def test_a_name_that_is_taken_and_keywords_that_are_wrong_are_told_at_once(service: Service, web: str) -> None:
    taken = service.ask("POST", "/vms/", {"base_image": "debian-12", "name": web})
    wrong = service.ask("POST", "/vms/", {"base_image": "debian-12", "netwerk": True})

    assert (taken.status, wrong.status) == (409, 422)
    assert web in taken.json["detail"]
    assert "did you mean 'network'" in wrong.json["detail"]


@pytest.mark.guests
def test_a_machine_that_cannot_be_started_is_an_error_with_the_reason_until_it_is_removed(service: Service) -> None:
    name = f"huge{os.getpid()}"
    service.post("/vms/", {"base_image": "debian-12", "name": name, "memory": "900G"}, 202)
    service.wait(name, "error")

    assert "memory=" in service.get(f"/vms/{name}").json["reason"]
    assert service.ask("POST", f"/vms/{name}/execute-sh", {"command": "true"}).status == 409
    assert service.ask("DELETE", f"/vms/{name}").status == 204
    assert service.get(f"/vms/{name}").status == 404


def test_pause_and_resume(service: Service, web: str) -> None:
    assert service.post(f"/vms/{web}/actions", {"action": "pause"})["state"] == "paused"
    assert service.post(f"/vms/{web}/actions", {"action": "resume"})["state"] == "running"


@pytest.mark.guests
def test_a_snapshot_brings_back_memory_and_disk(service: Service, web: str) -> None:
    service.sh(web, "echo before > /dev/shm/x; echo before > /srv/x; sync")
    service.post(f"/vms/{web}/actions", {"action": "snapshot", "label": "clean"})
    service.sh(web, "echo after > /dev/shm/x; echo after > /srv/x; sync")
    service.post(f"/vms/{web}/actions", {"action": "restore", "label": "clean"})

    assert service.sh(web, "cat /dev/shm/x /srv/x") == "before\nbefore\n"
    assert [each["label"] for each in service.get(f"/vms/{web}/snapshots").json] == ["clean"]
    assert service.ask("DELETE", f"/vms/{web}/snapshots/none").status == 404


# -- commands --------------------------------------------------------------------------------------------------------------------------


def test_a_command_has_its_status_and_both_streams(service: Service, web: str) -> None:
    ended = service.post(
        f"/vms/{web}/execute-sh", {"command": "cat; id -un; echo $WHO >&2; exit 3", "stdin": "é\n", "user": "nobody", "env": {"WHO": "me"}}
    )

    assert (ended["returncode"], ended["stdout"], ended["stderr"]) == (3, "é\nnobody\n", "me\n")
    assert (ended["truncated"], ended["timed_out"]) == (False, False)
    late = service.post(f"/vms/{web}/execute-sh", {"command": "echo begun; exec sleep 1000", "timeout": 2})
    assert (late["returncode"], late["stdout"], late["timed_out"]) == (-9, "begun\n", True)


def test_events_come_while_the_command_runs(service: Service, web: str) -> None:
    with closing(service.connect()) as connection:
        command = json.dumps(
            {"command": "echo one; echo two >&2; until [ -e /tmp/go ]; do sleep 0.1; done; printf 'a\\n\\nevent: exit\\n'"}
        )
        headers = {**service.bearer, "Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", f"/vms/{web}/execute-sh", command, headers)
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        first = sorted(line for line in (answer.readline() for _ in range(6)) if line.startswith(b"data"))
        service.sh(web, "touch /tmp/go")
        rest = answer.read().decode()

    assert first == [b'data: {"text": "one\\n"}\n', b'data: {"text": "two\\n"}\n']
    assert rest.count("event: exit") == 2  # the guest's own is text
    assert json.loads(rest.rsplit("data: ", 1)[1])["returncode"] == 0


@pytest.mark.guests
@pytest.mark.parametrize("accept", ["text/event-stream", pytest.param("application/json", marks=pytest.mark.guests)])
def test_a_command_ends_in_the_guest_when_its_client_hangs_up(service: Service, web: str, accept: str) -> None:
    mark = f"7{len(accept)}"
    with closing(service.connect()) as connection:
        command = json.dumps({"command": f"while :; do echo line; sleep 1.{mark}; done", "timeout": 300})
        connection.request(
            "POST", f"/vms/{web}/execute-sh", command, {**service.bearer, "Content-Type": "application/json", "Accept": accept}
        )
        assert Deadline(60).poll(lambda: pgrep(service, web, f"sleep 1[.]{mark}"), every=0.2)

    assert Deadline(60).poll(lambda: not pgrep(service, web, f"echo line; sleep 1[.]{mark}"), every=0.2)


# -- files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.guests
def test_uploaded_files_are_there_with_their_modes_and_what_was_before_is_cleaned(service: Service, web: str) -> None:
    files = [
        {"path": "bin/run", "text": "#!/bin/sh\necho ran\n", "mode": "0750"},
        {"path": "data", "content_b64": base64.b64encode(b"\0\xff").decode()},
    ]
    told = service.post(f"/vms/{web}/upload-files", {"dest_path": "/srv/site", "files": files}, 201)
    first = service.sh(web, "/srv/site/bin/run; stat -c '%a %n' /srv/site/bin/run /srv/site/data; od -An -tx1 /srv/site/data")
    service.post(f"/vms/{web}/upload-files", {"dest_path": "/srv/site", "clean": True, "files": [{"path": "only", "text": ""}]}, 201)

    assert told == {"dest_path": "/srv/site", "files": 2, "bytes": 21}
    assert first == "ran\n750 /srv/site/bin/run\n644 /srv/site/data\n 00 ff\n"
    assert service.sh(web, "find /srv/site -type f") == "/srv/site/only\n"


def test_all_files_are_uploaded_or_none(service: Service, web: str) -> None:
    files = [{"path": "good", "text": "x"}, {"path": "../bad", "text": "x"}]
    refused = service.ask("POST", f"/vms/{web}/upload-files", {"dest_path": "/srv/none", "files": files})

    assert refused.status == 422
    assert "../bad" in refused.json["detail"]
    assert service.sh(web, "ls -d /srv/none /srv/bad 2>&1 || true").count("No such file") == 2


@pytest.mark.guests
def test_folders_are_made_listed_and_read(service: Service, web: str) -> None:
    service.post(f"/vms/{web}/create-dir", {"paths": ["/srv/tree/a/b", "/srv/tree/c"]}, 201)
    service.sh(web, "printf 'text \\377end' > /srv/tree/a/file; ln -sf /etc/hostname /srv/tree/link")
    shallow = service.post(f"/vms/{web}/list-dirs", {"paths": ["/srv/tree"]})["entries"]
    deep = service.post(f"/vms/{web}/list-dirs", {"paths": ["/srv/tree"], "depth": None})["entries"]

    assert sorted((each["name"], each["type"]) for each in shallow) == [("a", "dir"), ("c", "dir"), ("link", "link")]
    assert {each["path"] for each in deep} >= {"/srv/tree/a/b", "/srv/tree/a/file"}
    (file,) = [each for each in deep if each["path"] == "/srv/tree/a/file"]
    assert (file["size"], file["mode"]) == (len(b"text\xff end"), 0o644)
    bad = service.ask("POST", f"/vms/{web}/read-file", {"paths": ["/srv/tree/a/file"]})
    assert (bad.status, "no UTF-8" in bad.json["detail"]) == (422, True)
    lenient = service.post(f"/vms/{web}/read-file", {"paths": ["/srv/tree/a/file"], "ignore_errors": True})
    assert lenient == {"files": [{"path": "/srv/tree/a/file", "text": "text end"}]}
    exact = service.post(f"/vms/{web}/read-file", {"paths": ["/srv/tree/a/file"], "encoding": "base64"})
    assert base64.b64decode(exact["files"][0]["content_b64"]) == b"text \xffend"
    assert service.ask("POST", f"/vms/{web}/read-file", {"paths": ["/srv/nowhere"]}).status == 404
    assert service.ask("POST", f"/vms/{web}/read-file", {"paths": ["/srv"]}).status == 409


def test_a_link_in_the_guest_is_never_followed_on_this_computer(service: Service, web: str, tmp_path: Path) -> None:
    secret, none = tmp_path / "secret", tmp_path / "none"
    for path in (secret, none):
        path.write_text("of this computer")
    # One of the files is there in the guest too, so the link leads somewhere.
    service.sh(
        web, f"mkdir -p {tmp_path} /srv/links; echo of the guest > {secret}; ln -sfn {secret} /srv/links/a; ln -sfn {none} /srv/links/b"
    )

    assert service.post(f"/vms/{web}/read-file", {"paths": ["/srv/links/a"]})["files"][0]["text"] == "of the guest\n"
    assert service.get(f"/vms/{web}/download-file?path=/srv/links/a").body == b"of the guest\n"
    assert service.get(f"/vms/{web}/download-file?path=/srv/links/b").status == 404
    with tarfile.open(fileobj=io.BytesIO(service.get(f"/vms/{web}/download-folder?path=/srv/links").body)) as tar:
        assert [member.name for member in tar.getmembers() if member.isfile()] == []


@pytest.mark.guests
def test_a_large_file_goes_in_and_comes_out_as_it_is(service: Service, web: str) -> None:
    data = os.urandom(8_000_000)
    put = service.ask("PUT", f"/vms/{web}/files?path=/srv/large.bin&mode=0640&owner=nobody", data)
    got = service.get(f"/vms/{web}/download-file?path=/srv/large.bin")

    assert (put.status, put.json) == (200, {"path": "/srv/large.bin", "bytes": len(data)})
    assert got.body == data
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["content-disposition"].startswith('attachment; filename="large.bin"')
    assert service.sh(web, "stat -c '%a %U' /srv/large.bin") == "640 nobody\n"


def test_an_upload_that_breaks_off_leaves_nothing(service: Service, web: str) -> None:
    with closing(service.connect()) as connection:
        connection.putrequest("PUT", f"/vms/{web}/files?path=/srv/broken")
        for name, value in {**service.bearer, "Content-Length": "1000000"}.items():
            connection.putheader(name, value)
        connection.endheaders(b"half of it")

    assert service.sh(web, "sleep 1; ls -d /srv/broken 2>&1 || true").count("No such file") == 1


@pytest.mark.guests
def test_a_folder_comes_as_either_kind_of_archive(service: Service, web: str) -> None:
    service.sh(web, "mkdir -p /srv/pack/in; echo content > /srv/pack/in/file")
    tarred = service.get(f"/vms/{web}/download-folder?path=/srv/pack")
    zipped = service.get(f"/vms/{web}/download-folder?path=/srv/pack&prefer_fmt=zip")

    assert (tarred.headers["content-type"], zipped.headers["content-type"]) == ("application/gzip", "application/zip")
    assert 'filename="pack.tar.gz"' in tarred.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(tarred.body)) as tar:
        assert [name for name in tar.getnames() if name.endswith("in/file")]
    assert [name for name in zipfile.ZipFile(io.BytesIO(zipped.body)).namelist() if name.endswith("in/file")]
    assert service.get(f"/vms/{web}/download-folder?path=/srv/nowhere").status == 404


def test_a_search_gives_matches_with_their_places(service: Service, web: str) -> None:
    service.sh(web, "mkdir -p /srv/search; printf 'one\\nNeedle 7\\n' > /srv/search/a.conf; echo needle > /srv/search/b.txt")
    query = {"pattern": "needle", "root": "/srv/search", "ignore_case": True, "include": ["*.conf"]}
    found = service.post(f"/vms/{web}/search", query)
    lines = service.ask("POST", f"/vms/{web}/search", query, Accept="application/x-ndjson").body.splitlines()

    assert found == {"matches": [{"path": "/srv/search/a.conf", "line": 2, "text": "Needle 7"}], "truncated": False, "timed_out": False}
    assert [json.loads(line) for line in lines] == [*found["matches"], {"truncated": False, "timed_out": False}]


# -- what there is to see --------------------------------------------------------------------------------------------------------------


def test_the_end_of_the_console_is_safe_to_show(service: Service, web: str) -> None:
    service.sh(web, r"printf 'first\nred \033[31m line\n' > /dev/console")

    assert Deadline(30).poll(lambda: r"red \x1b[31m line" in service.get(f"/vms/{web}/console/tail?lines=5").body.decode(), every=0.2)
    assert len(service.get(f"/vms/{web}/console/tail?lines=1").body.splitlines()) == 1


def test_metrics_for_a_client_and_for_prometheus(service: Service, web: str) -> None:
    figures = service.get(f"/metrics/{web}?seconds=0.1").json
    scraped = service.get("/metrics")

    assert figures["rss_bytes"] == pytest.approx(figures["rss_mib"] * (1 << 20), rel=0.001)
    assert re.fullmatch(r"[0-9.]+ [MG]iB", figures["rss_human"])
    assert figures["guest_memory_used_bytes"] > 0
    assert abs(figures["ts"] - time.time()) < 60
    assert scraped.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert f'vmbottle_machine_state{{name="{web}",state="running"}} 1\n' in scraped.body.decode()
    assert f'vmbottle_machine_rss_bytes{{name="{web}"}} ' in scraped.body.decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_creates_nothing_without_a_token_and_streams_a_command_with_it(service: Service, web: str) -> None:
    def curl(*words: str) -> str:
        return subprocess.run(["curl", "-sS", "-N", *words], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout

    refused = curl("-o", "/dev/null", "-w", "%{http_code}", "-d", "{}", f"{service.url}vms/")
    events = curl(
        *("-H", f"Authorization: Bearer {service.token}", "-H", "Content-Type: application/json", "-H", "Accept: text/event-stream"),
        *("-d", '{"command": "uname"}', f"{service.url}vms/{web}/execute-sh"),
    )

    assert refused == "401"
    assert 'data: {"text": "Linux\\n"}' in events


# -- the terminal ----------------------------------------------------------------------------------------------------------------------


class Screen:
    """A WebSocket of the library `websocket-client`, and what it has shown."""

    def __init__(self, service: Service, name: str, query: str = "", **how: Any) -> None:
        url = f"{service.url.replace('http', 'ws', 1)}vms/{name}/tty{query}"
        self.socket = websocket.create_connection(url, timeout=PATIENCE, **{"header": service.bearer, **how})
        self.text = ""
        self.told: list[Any] = []

    def sees(self, pattern: str) -> re.Match[str]:
        """Waits for something to be on the screen, and forgets what was before it."""
        while not (match := re.search(pattern, self.text)):
            self.take()
        self.text = self.text[match.end() :]
        return match

    def take(self) -> bool:
        kind, data = self.socket.recv_data()
        if kind == websocket.ABNF.OPCODE_BINARY:
            self.text += data.decode(errors="replace")
        elif kind == websocket.ABNF.OPCODE_TEXT:
            self.told.append(json.loads(data))
        return bool(kind != websocket.ABNF.OPCODE_CLOSE)

    def close(self) -> None:
        self.socket.close()
        self.socket.shutdown()  # which `close` leaves out if the service was the first


def test_a_terminal_types_interrupts_resizes_and_ends_with_its_status(service: Service, web: str) -> None:
    with closing(Screen(service, web, "?columns=100&rows=30")) as screen:
        screen.sees("# ")
        screen.socket.send("stty size; uname; exec 2>&1; sh -c 'echo ready; exec sleep 1000'\n")
        screen.sees(r"[\r\n]30 100")
        screen.sees("Linux")
        screen.sees(r"\nready")
        began = time.monotonic()
        screen.socket.send("ctrlc")
        screen.sees("# ")
        print(f"Ctrl-C to the next prompt: {(time.monotonic() - began) * 1000:.0f} ms")  # noqa: T201
        screen.socket.send(json.dumps({"type": "resize", "columns": 132, "rows": 43}))
        screen.socket.send_binary(b"until stty size | grep '^43 132'; do sleep 0.1; done\n")
        screen.sees(r"[\r\n]43 132")
        screen.sees("# ")
        screen.socket.send("(exit 7)\n")
        screen.sees("# ")
        screen.socket.send(json.dumps({"type": "ctrld"}))
        while screen.take():
            pass

    assert screen.told == [{"type": "exit", "status": 7}]


def test_a_shell_ends_with_its_socket(service: Service, web: str) -> None:
    with closing(Screen(service, web)) as screen:
        screen.sees("# ")
        screen.socket.send("exec sleep 4321\n")
        assert Deadline(60).poll(lambda: pgrep(service, web, "^sleep 4321"), every=0.2)
        # Cut, as by a client that was killed.
        screen.socket.sock.close()

    assert Deadline(60).poll(lambda: not pgrep(service, web, "^sleep 4321"), every=0.2)


def test_a_browsers_handshake_has_the_token_in_a_subprotocol_and_a_foreign_pages_is_refused(service: Service, web: str) -> None:
    with closing(Screen(service, web, header={}, subprotocols=["vmbottle.tty", f"vmbottle.bearer.{service.token}"])) as screen:
        assert screen.socket.getsubprotocol() == "vmbottle.tty"
        screen.sees("# ")
    for how, status in (({"header": {}}, 401), ({"origin": "https://evil.example"}, 403)):
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            Screen(service, web, **how)
        assert refused.value.status_code == status
    with pytest.raises(websocket.WebSocketBadStatusException) as missing:
        Screen(service, "nobody")
    assert missing.value.status_code == 404


# -- two services, and their ends ------------------------------------------------------------------------------------------------------


@pytest.mark.guests
def test_another_service_of_the_catalog_has_the_same_machine_and_ends_without_it(
    service: Service, web: str, vm_catalog: Catalog, tmp_path: Path
) -> None:
    with serving(vm_catalog.root, tmp_path) as other:
        assert other.sh(web, "uname") == "Linux\n"
        assert other.end() == 128 + signal.SIGTERM
    with serving(vm_catalog.root, tmp_path) as again:
        assert again.state(web) == "running"
    assert service.sh(web, "uname") == "Linux\n"


@pytest.mark.guests
def test_a_start_that_sigterm_cuts_short_leaves_nothing(service: Service, web: str, vm_catalog: Catalog, tmp_path: Path) -> None:
    name = f"cut{os.getpid()}"
    with serving(vm_catalog.root, tmp_path) as other:
        other.post("/vms/", {"base_image": "debian-12", "name": name, "fresh": "boot"}, 202)
        assert Deadline(60).poll((vm_catalog.machines / name / "record.json").exists, every=0.1)
        other.end(seconds=90)

    assert service.get(f"/vms/{name}").status == 404
    assert not (vm_catalog.machines / name).exists()
    assert service.state(web) == "running"


@pytest.mark.guests
def test_an_upload_that_sigterm_cuts_short_leaves_nothing(service: Service, web: str, vm_catalog: Catalog, tmp_path: Path) -> None:
    with serving(vm_catalog.root, tmp_path) as other, closing(other.connect()) as connection:
        connection.putrequest("PUT", f"/vms/{web}/files?path=/srv/cut")
        for key, value in {**other.bearer, "Content-Length": "1000000"}.items():
            connection.putheader(key, value)
        connection.endheaders(bytes(1000))
        assert other.state(web) == "running"
        sender = threading.Thread(target=_dribble, args=(connection,), daemon=True)
        sender.start()
        assert other.end(seconds=60) == 128 + signal.SIGTERM
        sender.join(10)

    assert service.sh(web, "ls -d /srv/cut /srv/.vmbottle* 2>&1 || true").count("No such file") == 2


def _dribble(connection: Any) -> None:
    """Sends on, slowly, until nobody listens."""
    try:
        while True:
            connection.send(b"x")
            time.sleep(0.1)
    except OSError:
        pass
