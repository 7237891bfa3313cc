"""What a machine poured from a pack is: the one that was bottled, awake, and no other clone's twin."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import paramiko
import pytest

from pytest_vmbottle import Layer, Machine, MachineFactory, MachineSpec, layer
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.provision import Provisioner, Settings

MUCH = bytes(range(256)) * 8192
"""So much that it takes a disk, which no saved machine may have."""


@layer("debian-12", depends=["conftest.py"])
def prepared(vm: Machine) -> None:
    vm.path("/root/on-disk").write_text("disk\n")
    vm.path("/dev/shm/in-memory").write_text("memory\n")
    vm.exec("systemd-run --unit=counting sh -c 'while :; do echo tick >> /dev/shm/ticks; sleep 0.2; done'")
    vm.wait_for_file("/dev/shm/ticks")


@layer("debian-12")
def laden(vm: Machine) -> None:
    vm.path("/root/much").write_bytes(MUCH)


@layer(prepared)
def higher(vm: Machine) -> None:
    assert vm.path("/dev/shm/in-memory").read_text() == "memory\n"
    vm.path("/root/on-disk").write_text("disk, higher\n")
    vm.path("/dev/shm/second").write_text("second\n")


@pytest.mark.vm(prepared)
def test_a_clone_goes_on_from_where_the_layer_left_off_with_its_memory_and_its_processes(vm: Machine) -> None:
    assert vm.path("/root/on-disk").read_text() == "disk\n"
    assert vm.path("/dev/shm/in-memory").read_text() == "memory\n"
    before = len(vm.path("/dev/shm/ticks").read_text().splitlines())
    vm.wait_until(lambda: len(vm.path("/dev/shm/ticks").read_text().splitlines()) > before)


@pytest.mark.guests
@pytest.mark.vm(laden)
def test_what_came_over_a_disk_before_is_in_a_clone_and_another_disk_can_be_had(vm: Machine, tmp_path: Path) -> None:
    vm.cp(vm.path("/root/much"), tmp_path)
    assert (tmp_path / "much").read_bytes() == MUCH


@pytest.mark.vm(higher)
def test_a_layer_on_a_layer_has_what_both_did(vm: Machine) -> None:
    assert vm.path("/root/on-disk").read_text() == "disk, higher\n"
    assert vm.path("/dev/shm/in-memory").read_text() == "memory\n"
    assert vm.path("/dev/shm/second").read_text() == "second\n"
    assert vm.exec(["systemctl", "is-active", "counting"]).stdout == "active\n"


@pytest.mark.vm(prepared)
def test_what_one_clone_does_no_other_sees(vm: Machine, vm_factory: MachineFactory) -> None:
    vm.path("/root/on-disk").write_text("changed\n")
    vm.path("/dev/shm/in-memory").write_text("changed\n")
    vm.exec(["sync"])
    other = vm_factory(prepared)
    assert other.path("/root/on-disk").read_text() == "disk\n"
    assert other.path("/dev/shm/in-memory").read_text() == "memory\n"


@pytest.mark.vm(prepared)
def test_clones_are_not_rebooted_and_yet_never_give_the_same_random_bytes(vm: Machine, vm_factory: MachineFactory) -> None:
    clones = [vm, *(vm_factory(prepared) for _ in range(2))]
    look = (
        "cat /proc/sys/kernel/random/boot_id; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; cat /proc/sys/kernel/random/uuid"
    )
    seen = [clone.exec(look).stdout.split() for clone in clones]
    boot_ids, random, uuids = ({each[column] for each in seen} for column in range(3))
    assert len(boot_ids) == 1
    assert len(random) == len(uuids) == len(clones)


@pytest.mark.vm(prepared)
def test_a_clones_clock_is_the_hosts(vm: Machine) -> None:
    before = time.time()
    guest = float(vm.exec(["date", "+%s.%N"]).stdout)
    assert before - 1 <= guest <= time.time() + 1


@pytest.mark.vm(prepared)
def test_a_clone_answers_on_tcp_with_the_host_key_that_was_made_for_it(vm: Machine) -> None:
    with socket.create_connection(vm.forward(22), timeout=30) as sock, paramiko.Transport(sock) as transport:
        transport.start_client(timeout=60)
        key = transport.get_remote_server_key()
    assert f"{key.get_name()} {key.get_base64()}" == " ".join(vm.path("/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])


@pytest.mark.guests
@pytest.mark.vm("debian-12", ports=[8080])
def test_forwarded_ports_lead_into_the_guest_and_only_this_host_can_use_them(vm: Machine) -> None:
    vm.exec("systemd-run python3 -m http.server --directory /etc 8080")
    vm.wait_for_port(8080)
    host, port = vm.forward(8080)
    assert host == "127.0.0.1"
    with socket.create_connection((host, port), timeout=30) as sock:
        sock.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.endswith(vm.path("/etc/hostname").read_bytes())
    assert vm.forward(9999) != vm.forward(8080)


# Knocks at all of them at once; a name server is asked for a name. Prints who answered: whoever opens a connection, or sends anything.
KNOCK = """
import errno, select, socket, sys

asked = {}
for word in sys.argv[1:]:
    address, port = word.rsplit(":", 1)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if port == "53" else socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        if sock.connect_ex((address, int(port))) not in (0, errno.EINPROGRESS):
            continue
        if port == "53":
            sock.send(bytes.fromhex("abcd01000001000000000000") + b"\\7example\\3org\\0\\0\\1\\0\\1")
    except OSError:
        continue
    asked[sock] = word
answered = set()
while asked:
    ready = select.select([s for s in asked if s.type == socket.SOCK_DGRAM], [s for s in asked if s.type != socket.SOCK_DGRAM], [], 3)
    found = [*ready[0], *ready[1]]
    if not found:
        break
    for sock in found:
        word = asked.pop(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            answered.add(word)
print(*sorted(answered))
"""


@pytest.mark.vm("debian-12")
def test_a_guest_reaches_nothing_of_the_host_unless_its_network_is_opened(vm: Machine, vm_factory: MachineFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"10.0.2.2:{server.getsockname()[1]}"
        # This host, what clouds tell their machines, the network, and the name server that the user network offers.
        others = ["169.254.169.254:80", "192.0.2.1:80", "1.1.1.1:443", "10.0.2.3:53"]
        vm.exec("ip route replace default via 10.0.2.2")  # a guest may believe what it likes about the way out
        assert vm.exec(["python3", "-c", KNOCK, host, *others]).stdout.split() == []
        opened = vm_factory("debian-12", network=True)
        assert opened.exec(["python3", "-c", KNOCK, host]).stdout.split() == [host]
        assert opened.exec("ip route get 192.0.2.1").stdout.startswith("192.0.2.1 via 10.0.2.2 ")


@pytest.mark.vm(
    "debian-12", files={"/etc/motd": "bottled\n", "/srv/bytes": b"\x00\xff"}, run=["echo ran > /root/ran"], env={"FROM": "the mark"}
)
def test_files_and_commands_of_a_mark_are_done_beforehand(vm: Machine) -> None:
    assert vm.path("/etc/motd").read_text() == "bottled\n"
    assert vm.path("/srv/bytes").read_bytes() == b"\x00\xff"
    assert vm.path("/root/ran").read_text() == "ran\n"
    assert vm.exec('echo "$FROM"').stdout == "the mark\n"


def make_package(file: Path, *, says: str = "installed", needs: str = "") -> str:
    """Make a package with a program of the file's name, and return what it says about itself."""
    tree = file.with_suffix("")
    (tree / "DEBIAN").mkdir(parents=True)
    about = f"Package: {file.stem}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: a test\n"
    (tree / "DEBIAN" / "control").write_text(about + (f"Depends: {needs}\n" if needs else ""))
    (tree / "usr" / "bin").mkdir(parents=True)
    (tree / "usr" / "bin" / file.stem).write_text(f"#!/bin/sh\necho {says}\n")
    (tree / "usr" / "bin" / file.stem).chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, file], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return about


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[int]:
    """A repository with one small package on a port of this host's loopback."""
    served = tmp_path / "served"
    served.mkdir()
    package = served / "bottled.deb"
    about = make_package(package)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    (served / "Packages").write_text(f"{about}Filename: ./bottled.deb\nSize: {package.stat().st_size}\nSHA256: {digest}\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.guests
def test_packages_of_a_mark_are_installed_beforehand_and_the_machine_stays_closed(repository: int, vm_factory: MachineFactory) -> None:
    @layer("debian-12", version=repository)
    def sourced(vm: Machine) -> None:
        vm.exec("rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
        vm.path("/etc/apt/sources.list").write_text(f"deb [trusted=yes] http://10.0.2.2:{repository} ./\n")

    vm = vm_factory(sourced, packages=["bottled"])
    assert vm.exec("bottled").stdout == "installed\n"
    assert vm.exec(["apt-get", "update", "--error-on=any"], check=False).returncode != 0


@pytest.mark.guests
def test_package_files_of_this_computer_are_installed_and_again_when_they_are_others(vm_factory: MachineFactory, tmp_path: Path) -> None:
    app, part = tmp_path / "app.deb", tmp_path / "part.deb"
    make_package(app, says="first", needs="part")
    make_package(part)
    # A layer without a network: the packages need nothing but each other.
    local = Layer(source="debian-12", function=None, keywords={"packages": [app, part], "network": False}, name="local")
    vm = vm_factory(local)
    assert vm.exec("app; part").stdout == "first\ninstalled\n"
    assert not vm.path("/var/tmp/vmbottle-packages").exists()

    make_package(app, says="second", needs="part")
    again = Layer(source="debian-12", function=None, keywords={"packages": [app, part], "network": False}, name="local")
    assert vm_factory(again).exec(["app"]).stdout == "second\n"


@pytest.mark.guests
def test_what_a_package_file_depends_on_comes_from_the_network(repository: int, vm_factory: MachineFactory, tmp_path: Path) -> None:
    @layer("debian-12", version=f"again {repository}")
    def sourced(vm: Machine) -> None:
        vm.exec("rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
        vm.path("/etc/apt/sources.list").write_text(f"deb [trusted=yes] http://10.0.2.2:{repository} ./\n")

    make_package(tmp_path / "needy.deb", says="it has all", needs="bottled")
    vm = vm_factory(sourced, packages=[tmp_path / "needy.deb"])
    assert vm.exec("needy; bottled").stdout == "it has all\ninstalled\n"


@pytest.mark.guests
def test_a_damaged_pack_is_refused_put_aside_and_built_again(vm_catalog: Catalog) -> None:
    provisioner = _provisioner(vm_catalog)
    spec = MachineSpec.resolve("debian-12", {"run": ["echo damaged > /root/which"]})
    pack = provisioner.pack(spec)
    state = pack.path / "state.bin"
    state.chmod(0o600)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    warned: list[str] = []
    again = _provisioner(vm_catalog, warned)
    with again.machine(spec) as machine:
        assert machine.path("/root/which").read_text() == "damaged\n"
    assert "state.bin" in warned[0]
    assert again.tally.built == 1
    again.close()
    provisioner.close()


def _provisioner(catalog: Catalog, warned: list[str] | None = None) -> Provisioner:
    said: list[str] = [] if warned is None else warned
    settings = Settings(warn=said.append)
    return Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=settings)


OWN_DATA = """#cloud-config-archive
- |
  #cloud-config
  write_files: [{path: /root/from-user-data, content: "ours \N{PINEAPPLE}"}]
  disable_root: true
  ssh_authorized_keys: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJ0aGVpcnMAAAAAAAAAAAAAAAAAAAAAAAAAAAAA theirs]
- |
  #!/bin/sh
  touch /root/ran
- |
  ## template: jinja
  #cloud-config
  runcmd: ["echo {{ v1.local_hostname }} > /root/rendered"]
"""


@pytest.mark.vm("debian-12", fresh="boot", disk="9G", cpus=2, user_data=OWN_DATA)
@pytest.mark.guests
def test_a_cold_machine_boots_with_keys_of_its_own_and_what_its_mark_says(vm: Machine, vm_factory: MachineFactory) -> None:
    poured = vm_factory("debian-12")
    facts = "cat /proc/sys/kernel/random/boot_id /etc/ssh/ssh_host_ed25519_key.pub /root/.ssh/authorized_keys"
    assert set(vm.exec(facts).stdout.splitlines()).isdisjoint(poured.exec(facts).stdout.splitlines())
    assert vm.exec(["cloud-init", "status"]).stdout == "status: done\n"
    assert vm.path("/root/from-user-data").read_text() == "ours \N{PINEAPPLE}"
    assert vm.path("/root/ran").exists()
    assert vm.path("/root/rendered").read_text() == "vm\n"
    ours, theirs = sorted(vm.path("/root/.ssh/authorized_keys").read_text().splitlines(), key=lambda line: line.endswith("theirs"))
    assert ours.startswith("ssh-ed25519 ")
    assert theirs.startswith("ssh-ed25519 ")
    assert vm.exec(["nproc"]).stdout == "2\n"
    assert int(vm.exec("df --output=size -B1 / | tail -1").stdout) > 8.5 * 2**30
    poured.exec("mount -r /dev/disk/by-label/cidata /mnt")  # a seed without user-data of the test's own
    assert "Valid cloud-config" in poured.exec(["cloud-init", "schema", "--config-file", "/mnt/user-data"], timeout=200).stdout
