"""The serial console of a real guest, and its kernel's cries for help."""

from __future__ import annotations

import re
import shlex
import time

import pytest

from pytest_vmbottle import GuestPanic, Machine, MachineError

pytestmark = pytest.mark.vm("debian-12")


def test_it_has_what_the_guest_wrote_to_it_with_control_characters_made_visible(session_vm: Machine) -> None:
    session_vm.exec(r"printf 'first\nred \033[31m\nlast\n' > /dev/ttyS0")
    session_vm.wait_until(lambda: "last" in session_vm.console.text)
    assert session_vm.console.tail(2) == "red \\x1b[31m\nlast"


@pytest.mark.guests
def test_it_is_followed_line_by_line_until_the_machine_ends(vm: Machine) -> None:
    vm.exec("echo there already > /dev/ttyS0")
    vm.spawn("sleep 0.5; echo comes later > /dev/ttyS0; sleep 0.5; echo no end; echo o > /proc/sysrq-trigger")
    lines = list(vm.console.follow(timeout=300))
    assert lines.index("there already") < lines.index("comes later")
    assert any("Power off" in line or "Power down" in line for line in lines)
    vm.wait_for_shutdown()


ASKS = "stty -echo; printf 'Passphrase: '; read -r word; stty echo; printf 'it has %s\\n' \"$(printf %s \"$word\" | wc -c)\"; read -r more"
ON_THE_CONSOLE = "-p StandardInput=tty -p StandardOutput=tty -p TTYPath=/dev/ttyS0"


def test_text_is_typed_on_it_and_what_it_says_since_then_is_awaited(session_vm: Machine) -> None:
    session_vm.exec("echo it has 5 already > /dev/ttyS0")
    session_vm.exec(f"systemd-run --unit=asks {ON_THE_CONSOLE} sh -c {shlex.quote(ASKS)}")
    session_vm.wait_until(lambda: "Passphrase: " in session_vm.console.text)
    session_vm.send_console("grüße\n")
    assert session_vm.wait_for_console(re.compile("it has ([0-9]+)"))[1] == "7"  # not the 5 from before, and in UTF-8
    assert "grü" not in session_vm.console.text
    session_vm.send_console("\x03")  # Ctrl-C
    session_vm.wait_until("! systemctl is-active asks")


@pytest.mark.guests
def test_a_guest_that_does_not_read_from_it_holds_up_nobody_for_ever(vm: Machine) -> None:
    with pytest.raises(MachineError, match=r"cannot type on the serial console: the guest has left \d+ of 4194304 bytes unread"):
        vm.send_console("x" * (4 << 20))


@pytest.mark.guests
@pytest.mark.vm(panic="expected")
def test_an_emergency_shell_can_be_used_and_left_where_trouble_is_expected(vm: Machine) -> None:
    vm.exec("echo root:sesame | chpasswd; systemctl emergency --no-block")
    vm.wait_for_console("(or press Control-D to continue): ")
    vm.send_console("sesame\n")
    vm.wait_for_console("# ")
    vm.send_console("echo it is $(systemctl is-active emergency.target)\n")
    vm.wait_for_console("it is active")
    vm.send_console("systemctl default\n")
    vm.wait_until("systemctl is-active default.target")
    assert vm.unit("emergency.target").state == "inactive"


@pytest.mark.guests
@pytest.mark.vm(panic="expected")
def test_a_panic_ends_the_command_that_a_test_waits_for_at_once_with_the_console(vm: Machine) -> None:
    process = vm.spawn("echo waiting; sleep 1; echo c > /proc/sysrq-trigger")
    began = time.monotonic()
    with pytest.raises(GuestPanic, match="sysrq triggered crash") as caught:
        vm.exec("sleep 1000", timeout=600)
    assert "sysrq: Trigger a crash" in caught.value.console_tail
    for attempt in (lambda: vm.exec(["true"]), process.wait, lambda: list(process.stdout), lambda: vm.path("/etc").exists()):
        with pytest.raises(GuestPanic):
            attempt()
    assert time.monotonic() - began < 100
    assert vm.panic == "Kernel panic - not syncing: sysrq triggered crash"


@pytest.mark.guests
@pytest.mark.vm(panic="expected")
def test_a_task_that_hangs_in_the_kernel_is_noticed_and_where_it_is_expected_the_machine_can_be_used(vm: Machine) -> None:
    vm.exec(
        "truncate -s 16M /root/disk; mkfs.ext4 -q /root/disk; mkdir /mnt/hangs; mount -o loop /root/disk /mnt/hangs; "
        "echo 1 > /proc/sys/kernel/hung_task_timeout_secs; fsfreeze -f /mnt/hangs; "
        "systemd-run touch /mnt/hangs/file"
    )
    vm.wait_until(lambda: vm.panic)
    assert "INFO: task touch:" in str(vm.panic)
    assert vm.exec(["echo", "usable"]).stdout == "usable\n"


INNER = r"""
import time
import pytest

pytestmark = pytest.mark.vm("debian-12")
OOPS = "echo '<1>BUG: unable to handle page fault for address: 0' > /dev/kmsg"

def test_that_does_not_look(vm):
    vm.exec(f"(sleep 0.5; {OOPS}) > /dev/null 2>&1 &")
    time.sleep(2)

def test_that_calls(vm):
    vm.exec(OOPS)
    vm.exec("sleep 1000")

@pytest.mark.vm(panic="expected")
def test_that_expects_it(vm):
    vm.exec(OOPS)
    vm.wait_for_console("BUG: unable to handle")
    vm.exec("true")

def test_whose_programs_say_so(vm):
    vm.exec("echo 'BUG: in my program'; echo 'BUG: in my program' > /dev/console; echo 'Oops: 3' > /dev/ttyS0; sleep 0.5")
"""


@pytest.mark.guests
def test_a_kernel_in_trouble_fails_the_test_unless_it_is_expected_and_a_programs_own_words_do_not(
    inner: pytest.Pytester,
) -> None:
    inner.makepyfile(INNER)
    result = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail")
    result.assert_outcomes(failed=2, passed=2)
    result.stdout.fnmatch_lines(
        [
            "The test passed, but the kernel of its machine 'vm' was in trouble: BUG: unable to handle page fault for address: 0",
            "*console of vm*",
            "*GuestPanic: the guest's kernel is in trouble: BUG: unable to handle page fault for address: 0",
        ],
        consecutive=False,
    )
