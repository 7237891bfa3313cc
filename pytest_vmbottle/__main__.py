"""The command `vmbottle`, also as `python -m pytest_vmbottle`."""

from __future__ import annotations

import os
import sys

from pytest_vmbottle.standalone.quick import execute

__all__ = ["main"]


def main() -> None:
    """Run the command line; a plain `machine exec` without loading the others."""
    status = execute(sys.argv[1:])
    if status is not None:
        # Nothing has to be tidied up, for which Python takes as long as for all that was loaded.
        sys.stderr.flush()
        os._exit(status)
    from pytest_vmbottle.cli import main as run  # noqa: PLC0415 - what is not loaded for the above

    run()


if __name__ == "__main__":
    main()
