"""Choice of the processor that a guest sees.

It is the best one of this host or the one asked for, with or without virtualisation of its own.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import NANOSECONDS_PER_INSTRUCTION
from pytest_vmbottle.backends.qemu.command_line import Accelerator
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.files import read_or_empty
from pytest_vmbottle.spec import MachineSpec

__all__ = ["accelerator_for", "host_processor"]

_V2 = "ssse3=on,sse4.1=on,sse4.2=on,popcnt=on"
_V3 = f"{_V2},xsave=on,avx=on,avx2=on,bmi1=on,bmi2=on,f16c=on,fma=on,abm=on,movbe=on"
_V4 = f"{_V3},avx512f=on,avx512bw=on,avx512cd=on,avx512dq=on,avx512vl=on"
_LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}
"""Features that each level of the x86-64 psABI (section 3.1.1, "Processor Architecture") has beside those of QEMU's model qemu64."""

_NESTING_MODEL = "EPYC-v1"
"""Model that TCG emulates for nested guests. Its widest model, `max`, has AMD-V too, but a guest of libkrun starts ten times as slowly."""

_NESTING_FEATURES = ",+svm,+npt"
"""AMD-V and its nested page tables: the only hardware virtualisation that TCG emulates (TCG_EXT3_FEATURES in target/i386/cpu.c)."""

_SAFE_THREADS = (8, 1)
"""Version since which QEMU locks the page of guest code that it translates.

Older ones miss for ever what another processor writes there at that moment: a kernel puts a breakpoint into its own code while it changes
it (text_poke_bp in arch/x86/kernel/alternative.c), and may hit that breakpoint again and again after it is gone. With one thread for all
processors nothing is missed. Measured: with two processors that switched the tracing of the scheduler on and off, guests of QEMU 7.2
stopped within 20 times, those of QEMU 10.0 ran 500 times and more.

A guest with nested guests keeps its threads. With one thread for all it made machines five times as slowly, and with its threads it stopped
at one in some hundreds. It is to run them on other processors than its first, into whose flags (env->hflags2) QEMU lets all others write:
see docs/machines.md.
"""

_COUNTING = f"shift={(NANOSECONDS_PER_INSTRUCTION - 1).bit_length()},sleep=off"
"""Argument for clocks that follow instructions. While the processor has nothing to do they go on at once to the next timer."""

_FEATURES = {"kvm_amd": _NESTING_FEATURES, "kvm_intel": ",+vmx"}
_MODULES = Path("/sys/module")


def accelerator_for(
    spec: MachineSpec, accelerator: Accelerator, *, emulation: Accelerator, version: str, modules: Path = _MODULES
) -> Accelerator:
    """Return the accelerator for the processors of a machine.

    Args:
        spec: The machine's spec.
        accelerator: The accelerator that this host uses.
        emulation: The one that emulates the processor.
        version: QEMU's version line.
        modules: The folder of the kernel's modules in sysfs.

    Raises:
        BackendUnavailable: The guest is to run virtual machines, and this host does not support that.
    """
    if spec.cpu_clock == "instructions":  # which hardware does not count
        option = emulation.option.replace("thread=multi", "thread=single")
        return attrs.evolve(emulation, option=option, cpu=_model(spec) or emulation.cpu, counting=_COUNTING)
    if not spec.nested:
        if spec.cpus > 1 and not _has_safe_threads(version):
            # Only the option of TCG has these words: with hardware virtualisation nothing changes.
            accelerator = attrs.evolve(accelerator, option=accelerator.option.replace("thread=multi", "thread=single"))
        return attrs.evolve(accelerator, cpu=_model(spec) or accelerator.cpu)
    if accelerator.name == "tcg":  # more code of more address spaces is kept translated
        model = _model(spec) or _NESTING_MODEL
        return attrs.evolve(accelerator, option=accelerator.option.replace("tb-size=256", "tb-size=512"), cpu=model + _NESTING_FEATURES)
    features = _hardware_features(accelerator, modules)
    return attrs.evolve(accelerator, cpu=_model(spec) + features if spec.cpu else accelerator.cpu)


def host_processor(spec: MachineSpec, accelerator: Accelerator, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a digest of what the saved state of a machine depends on in this host's processor and kernel.

    Args:
        spec: The machine's spec.
        accelerator: The accelerator for its processors.
        cpuinfo: What proc_cpuinfo(5) describes.
    """
    if accelerator.name == "tcg":
        return ""  # its processors are the same everywhere
    lines = set(read_or_empty(cpuinfo).splitlines())
    if _is_level(spec):
        # A level has nothing of the host's processor but the maker, and of its kernel only what QEMU insists on.
        return digest(sorted(line for line in lines if line.startswith("vendor_id")))
    # Only what stays: other lines, such as the clock rate, change from one moment to the next.
    keep = ("model name", "flags", "microcode", "stepping")
    return f"{digest(sorted(line for line in lines if line.startswith(keep)))} {platform.release()}"


def _is_level(spec: MachineSpec) -> bool:
    # What nested guests need is the host's own.
    return not spec.nested and (spec.cpu or "").partition(",")[0] in _LEVELS


def _model(spec: MachineSpec) -> str:
    """Return the processor that a spec names, as QEMU takes it; empty if it names none."""
    name, comma, features = (spec.cpu or "").partition(",")
    if name not in _LEVELS:
        return spec.cpu or ""
    # Without "enforce" QEMU leaves out what the host lacks, and a pack would be restored where its programs meet an invalid instruction.
    return f"qemu64,svm=off,{_LEVELS[name]}{comma}{features},enforce=on"


def _has_safe_threads(version: str) -> bool:
    found = re.search(r"version (\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= _SAFE_THREADS


def _hardware_features(accelerator: Accelerator, modules: Path) -> str:
    """Return the host's virtualisation features for a model, if the kernel passes them on."""
    if accelerator.name != "kvm":
        raise BackendUnavailable(f"nested=True is not supported with the accelerator {accelerator.name}", "Use: --vm-accel tcg")
    module = next((name for name in _FEATURES if (modules / name).is_dir()), None)
    if module is None:
        raise BackendUnavailable("nested=True needs kvm_intel or kvm_amd, and this host's KVM has neither", "Use: --vm-accel tcg")
    switch = modules / module / "parameters" / "nested"
    # Kernels show this parameter as an integer or as a bool, depending on the module and the version.
    if not switch.is_file() or switch.read_text().strip() not in ("1", "Y"):
        remedy = (
            f"Turn it on: echo 'options {module} nested=1' | sudo tee /etc/modprobe.d/nested.conf && "
            f"sudo modprobe -r {module} && sudo modprobe {module}; or use emulation: --vm-accel tcg"
        )
        raise BackendUnavailable(f"this host's KVM does not let guests run virtual machines (nested=True): {switch} is not 1", remedy)
    return _FEATURES[module]
