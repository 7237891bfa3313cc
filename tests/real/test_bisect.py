"""The layer, the package upgrade and the command after which something fails, found with real clones."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog

_LAYERS = '''
from pytest_vmbottle import Machine, layer

# The packages one, two and three: version 1 is installed, and a repository in the guest has version 2, by which `two` breaks.
_REPOSITORY = """
mkdir -p /srv/repo; cd /srv/repo
for version in 1 2; do
  for name in one two three; do
    rm -rf /tmp/p; mkdir -p /tmp/p/DEBIAN /tmp/p/opt
    echo "$name $version" > "/tmp/p/opt/$name"
    control=/tmp/p/DEBIAN/control
    printf '%s\\n' "Package: $name" "Version: $version" 'Architecture: all' 'Maintainer: a <a@b.c>' 'Description: x' > $control
    dpkg-deb -b /tmp/p "$name-$version.deb"
  done
done
dpkg -i ./*-1.deb
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
for file in *-2.deb; do
  dpkg-deb -f "$file"
  echo "Filename: ./$file"; echo "Size: $(stat -c %s "$file")"; echo "SHA256: $(sha256sum < "$file" | cut -d' ' -f1)"; echo
done > Packages
echo 'deb [trusted=yes] file:/srv/repo ./' > /etc/apt/sources.list
apt-get update
"""

@layer("debian-12", memory="1G")
def first(vm: Machine) -> None:
    vm.exec("echo first > /root/first")

@layer(first)
def second(vm: Machine) -> None:
    vm.exec(_REPOSITORY, timeout=120)

@layer(second)
def third(vm: Machine) -> None:
    vm.exec("echo third > /root/third")
'''


def bisect(catalog: Catalog, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(catalog.root), "bisect", *words]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_the_culprit_of_64_commands_is_found_in_6_trials(vm_catalog: Catalog, tmp_path: Path) -> None:
    # Each of them leaves something that the next one needs, so that one which is left out or run twice is noticed.
    steps = [f'test "$(cat /root/step)" = {number - 1} && echo {number} > /root/step' for number in range(1, 65)]
    steps[0], steps[36] = "echo 1 > /root/step", f"{steps[36]} && touch /root/broken"
    file = tmp_path / "steps.sh"
    file.write_text("\n".join(("# steps", "", *steps)))
    # It leaves something too, of which the next trial would fail.
    command = ("sh", "-c", "test ! -e /root/tried && touch /root/tried && test ! -e /root/broken")
    done = bisect(vm_catalog, "--commands", str(file), "--json", "debian-12", "--", *command)
    verdict = json.loads(done.stdout)
    assert (verdict["culprit"]["point"], verdict["culprit"]["label"]) == (37, steps[36])
    assert [verdict[end]["passed"] for end in ("first", "last")] == [True, False]
    assert len(verdict["trials"]) == 6
    assert "fails itself" not in done.stderr
    assert f"the culprit is command 37 of 64: {steps[36]}" in done.stderr


@pytest.mark.guests
def test_the_layer_and_the_upgrade_that_broke_it_are_found(vm_catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "layers.py"
    file.write_text(_LAYERS)
    done = bisect(vm_catalog, f"{file}::third", "--", "test", "!", "-e", "/opt/two")
    assert done.stdout.startswith("2\tsecond (")
    assert "packages that it changed: one 1 (new), three 1 (new), two 1 (new)" in done.stderr
    done = bisect(vm_catalog, "--upgrades", f"{file}::third", "--", "grep", "-q", "two 1", "/opt/two")
    assert done.stdout.endswith("--only-upgrade -- two\n")
    assert "3 upgrades: at most 2 trials" in done.stderr
    done = bisect(vm_catalog, f"{file}::third", "--", "true", status=1)
    assert "does not fail at the last point, after third" in done.stderr
    done = bisect(vm_catalog, f"{file}::third", "--", "false", status=1)
    assert "fails at the first point already, debian-12" in done.stderr
    assert "trial 1" not in done.stderr


@pytest.mark.guests
def test_of_a_capsule_the_test_itself_is_the_last_point(inner: pytest.Pytester, vm_catalog: Catalog) -> None:
    inner.makepyfile(
        test_bisected="""
        import pytest

        @pytest.mark.vm("debian-12")
        def test_it(vm):
            vm.exec("echo broken > /dev/shm/state")
            assert False
        """
    )
    inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", "--vm-capsule=failed")
    done = bisect(vm_catalog, "test_bisected-py-test_it", "--", "test", "!", "-e", "/dev/shm/state")
    assert done.stdout == "1\tthe test itself (capsule test_bisected-py-test_it)\n"
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(vm_catalog.root), "capsule", "rm", "test_bisected-py-test_it"]
    subprocess.run(argv, check=True)
