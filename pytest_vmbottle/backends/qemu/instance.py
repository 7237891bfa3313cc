"""One QEMU machine: started cold or from a saved state, watched while it runs, saved, ended."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import attrs

from pytest_vmbottle._os import Deadline, copy_sparse
from pytest_vmbottle.backend import Channel, Console, Keys, Start
from pytest_vmbottle.backends.qemu.process import QemuProcess, connect
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.backends.qemu.waker import Waker
from pytest_vmbottle.channels.guest_agent import GuestAgent
from pytest_vmbottle.errors import BackendUnavailable, LaunchError, MachineDied, MachineError, MachineTimeout
