from __future__ import annotations
import pytest, time
from pytest_vmbottle import Machine, layer
pytestmark = pytest.mark.vm(backend="smolvm", memory="256M")

def test_a(session_vm):
    vm = session_vm
    t = time.time()
    try: vm.exec("echo before; sleep 4711 & setsid sleep 4711 & sleep 4711", timeout=2)
    except Exception as e: print(repr(e), str(e), time.time()-t)
    print(vm.exec(["pgrep", "-f", "sleep 4711"], check=False))
    pr = vm.spawn(["sleep", "99"]); t = time.time(); pr.kill("TERM"); print(pr.wait(timeout=30), time.time()-t)
    for c in ("exit 3", "exit 137", "kill -KILL $$", "kill -TERM $$", "echo out; echo err >&2", ["no-such-program", "x"], ["/etc/hostname"], ["env"], ["pwd"]):
        t = time.time(); r = vm.exec(c, check=False); print(c, r.returncode, repr(r.stdout), repr(r.stderr), round(time.time()-t,2))
    print(vm.exec(["cat"], input=bytes(range(256))*200).stdout_bytes == bytes(range(256))*200)
    print(vm.exec(["sh","-c","id -un; echo $HOME"], user="nobody"), vm.exec(["true"], user="somebody", check=False))
    b = vm.exec("cat /proc/sys/kernel/random/boot_id").stdout
    t = time.time(); vm.reboot(); print("reboot", time.time()-t, b, vm.exec("cat /proc/sys/kernel/random/boot_id").stdout)
    t = time.time(); vm.path("/root/kept").write_text("kept"); s = vm.snapshot("s"); print("snap", time.time()-t)
    vm.path("/root/kept").unlink()
    t = time.time(); vm.restore(s); print("restore", time.time()-t, vm.path("/root/kept").read_text())
    t = time.time(); vm.power_cut(); print(vm.state); vm.start(); print("cut start", time.time()-t, vm.path("/root/kept").read_text())
    t = time.time(); vm.poweroff(); print(vm.state); vm.start(); print("off start", time.time()-t, vm.path("/root/kept").read_text())

@layer("smolvm", backend="smolvm", memory="256M", run=["echo one > /root/one"])
def prepared(vm):
    vm.path("/root/two").write_text("2")

@pytest.mark.vm(prepared, ports=[80], env={"A": "b"}, files={"/root/three": "3"})
def test_layer(vm):
    print(vm.exec("cd /root; cat one two three; echo $A").stdout, vm.forward(80))
    pr = vm.spawn("while true; do echo hello | nc -l -p 80; done")
    vm.wait_for_port(80, forwarded=True)
    import socket
    with socket.create_connection(vm.forward(80), 5) as s: print(s.recv(10))
