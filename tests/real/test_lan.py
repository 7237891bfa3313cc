"""Private LANs: machines that see each other by name, and nothing else."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pytest_vmbottle import CommandTimeout, Machine, MachineError, SpecError
from pytest_vmbottle.lan import Lans

pair = [
    pytest.mark.vm("debian-12", name="web", network="lan"),
    pytest.mark.vm("debian-12", name="db", network="lan"),
]

_FACTS = "hostname; for card in /sys/class/net/e*; do cat $card/address; done; ip -4 -o addr show scope global | awk '{print $4}'"
_SERVE = "import sys,socket;c=socket.create_server(('',9)).accept()[0];f=c.makefile('rwb');d=f.read(int(sys.argv[1]));f.write(d);f.flush()"
_SEND = """
import hashlib, os, socket, sys
size = int(sys.argv[1]); data = os.urandom(size)
with socket.create_connection(('db', 9)) as c, c.makefile('rwb') as f:
    f.write(data); f.flush(); back = f.read(size)
print(back == data, len(back))
"""


def pings(machine: Machine, name: str, *, count: int = 1, wait: float = 2) -> bool:
    """Whether a name or address answers echo requests; this image has no `ping`, so a raw socket does it."""
    return machine.exec(["python3", "-c", _PING, name, str(count), str(wait)], check=False, timeout=60).ok


_PING = """
import os, socket, struct, sys, time
def checksum(b):
    s = sum(struct.unpack('!%dH' % (len(b) // 2), b)); s = (s >> 16) + (s & 0xffff); return ~(s + (s >> 16)) & 0xffff
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP); s.settimeout(float(sys.argv[3]))
head = lambda c: struct.pack('!BBHHH', 8, 0, c, os.getpid() & 0xffff, 1)
for _ in range(int(sys.argv[2])):
    s.sendto(head(checksum(head(0))), (sys.argv[1], 0)); began = time.monotonic()
    while True:
        answer = s.recv(1024)
        if answer[20] == 0 and answer[24:26] == struct.pack('!H', os.getpid() & 0xffff): break
    print(time.monotonic() - began)
"""


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
def test_clones_of_one_pack(vms: dict[str, Machine]) -> None:
    web, db = vms["web"], vms["db"]
    print(web.exec(_FACTS).stdout, db.exec(_FACTS).stdout, web.exec("cat /etc/hosts; ip a; networkctl").stdout)
    assert pings(web, "db")
    assert pings(db, "web")
    db.exec(["systemd-run", "python3", "-c", _SERVE, str(4 << 20)])
    db.wait_for_port(9)
    t = time.time()
    assert web.exec(["python3", "-c", _SEND, str(4 << 20)]).stdout.split() == ["True", str(4 << 20)]
    print("4 MiB both ways", time.time() - t)
    web.impair(delay=0.2)
    print(web.exec(["python3", "-c", _PING, "db", "3", "3"]).stdout)
