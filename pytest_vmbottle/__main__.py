"""Run the command `vmbottle` as `python -m pytest_vmbottle`."""

from __future__ import annotations

from pytest_vmbottle.cli import main

if __name__ == "__main__":
    main()
