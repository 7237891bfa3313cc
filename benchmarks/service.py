"""Speed of the service: lists of machines, Ctrl-C, and 100 MB up and down, beside `vmbottle machine cp`.

Run it on an otherwise idle computer: `python benchmarks/service.py [--catalog DIR]`. It takes `pip install websocket-client`.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import websocket

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pytest_vmbottle.catalog.location import default_root  # noqa: E402
from pytest_vmbottle.host.files import private_dir  # noqa: E402
from pytest_vmbottle.standalone.record import Record  # noqa: E402
from tests.service.running import Service, serving  # noqa: E402

MACHINES, CLIENTS, SECONDS = 20, 8, 5.0
SIZE = 100_000_000
NAME = f"bench{os.getpid()}"


def rate(service: Service) -> float:
    """Return the `GET /vms/` that several clients get per second."""
    counts: list[int] = []

    def client() -> None:
        count, until = 0, time.monotonic() + SECONDS
        with closing(service.connect()) as connection:
            while time.monotonic() < until:
                connection.request("GET", "/vms/", headers=service.bearer)
                answer = connection.getresponse()
                assert answer.status == http.client.OK
                answer.read()
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def interrupted(service: Service, times: int = 10) -> list[float]:
    """Return the milliseconds from Ctrl-C on a WebSocket to the word of the program in the guest that catches it."""
    where = urlsplit(service.url)
    url = f"ws://{where.netloc}/vms/{NAME}/tty"
    took = []
    with closing(websocket.create_connection(url, timeout=120, header=service.bearer)) as socket:
        seen = ""

        def sees(pattern: str) -> None:
            nonlocal seen
            while not (match := re.search(pattern, seen)):
                _, data = socket.recv_data()
                seen += data.decode(errors="replace")
            seen = seen[match.end() :]

        sees("# ")
        # A loop of builtins: what is measured is the key, and not the start of a program.
        socket.send("trap 'echo cau''ght' INT; while :; do read -t 1000 line < /dev/tty; done\n")
        time.sleep(2)
        for _ in range(times):
            began = time.monotonic()
            socket.send("ctrlc")
            sees("caught")
            took.append((time.monotonic() - began) * 1000)
            time.sleep(0.3)
    return took


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the least of the seconds that some work takes."""

    def once() -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    return min(once() for _ in range(times))


def transfers(service: Service, root: Path, folder: Path) -> None:
    """Print how long 100 MB take up and down, by the service and by the command."""
    file, back = folder / "data", folder / "back"
    file.write_bytes(os.urandom(SIZE))
    command = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(root), "machine"]

    def copy(source: str, target: str) -> None:
        subprocess.run([*command, "cp", source, target], check=True)

    def up() -> None:
        with file.open("rb") as body:
            answer = service.ask("PUT", f"/vms/{NAME}/files?path=/srv/up", body, Content_Length=str(SIZE))
            assert answer.status == http.client.OK, answer

    def down() -> None:
        answer = service.get(f"/vms/{NAME}/download-file?path=/srv/up")
        assert len(answer.body) == SIZE

    def copy_back() -> None:
        back.unlink(missing_ok=True)
        copy(f"{NAME}:/srv/up", str(back))

    start = seconds(lambda: subprocess.run([*command, "ls"], check=True, stdout=subprocess.DEVNULL))
    for label, ours, theirs in (
        ("up", seconds(up), seconds(lambda: copy(str(file), f"{NAME}:/srv/copied")) - start),
        ("down", seconds(down), seconds(copy_back) - start),
    ):
        mb = SIZE / 1e6
        print(f"100 MB {label}: {mb / ours:.0f} MB/s; vm.cp, by the command: {mb / theirs:.0f} MB/s; share {theirs / ours:.2f}")


def main() -> None:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalog", type=Path, default=Path(os.environ.get("VMBOTTLE_CATALOG") or default_root()))
    root: Path = parser.parse_args().catalog
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crowded = folder / "crowded"
        for number in range(MACHINES):
            record = Record(name=f"m{number}", source="debian-12", state="stopped", spec={"cpus": 1, "memory": 1 << 30})
            record.write(private_dir(crowded / "machines" / record.name) / "record.json")
        with serving(crowded, folder) as service:
            print(f"GET /vms/ with {MACHINES} machines: {rate(service):.0f} per second by {CLIENTS} clients")
        with serving(root, folder) as service:
            service.create(NAME)
            try:
                took = interrupted(service)
                print(f"Ctrl-C to the guest and back: median {statistics.median(took):.0f} ms, at most {max(took):.0f} ms")
                transfers(service, root, folder)
            finally:
                service.ask("DELETE", f"/vms/{NAME}")


if __name__ == "__main__":
    main()
