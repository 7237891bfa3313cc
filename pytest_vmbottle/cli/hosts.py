"""`vmbottle hosts`: what the hosts of a run can do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import CANNOT, emit, examples, json_option, one_line, say, show_table

if TYPE_CHECKING:
    from pytest_vmbottle.hosts.survey import HostFacts

__all__ = ["hosts"]


@click.command(epilog=examples("vmbottle hosts ssh://ann@lab1 ssh://ann@lab2", "vmbottle hosts --json ssh://lab1 | jq '.[].memory'"))
@click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True, envvar="VMBOTTLE_HOSTS")
@json_option
def hosts(*, addresses: tuple[str, ...], as_json: bool) -> None:
    """Show what other hosts can do, on which pytest would run tests.

    The addresses are those of `pytest --vm-hosts`, or of VMBOTTLE_HOSTS. Each host is asked by ssh what its own `vmbottle doctor` says, and
    which packs and machines it has. The exit status is 0 if all of them can run machines, else 3.
    """
    import attrs

    from pytest_vmbottle.errors import SpecError
    from pytest_vmbottle.hosts.survey import survey
    from pytest_vmbottle.spec.host_address import HostAddress

    try:
        wanted = HostAddress.parse_all(",".join(addresses))
    except SpecError as error:
        raise click.BadParameter(str(error), param_hint="ADDRESS") from None
    # At once: each takes seconds, and a host that is silent takes long.
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(survey, wanted))
    if as_json:
        emit([attrs.asdict(each) for each in found])
    else:
        show_table(("HOST", "STATE", "ACCELERATOR", "FREE", "PACKS", "MACHINES"), map(_row, found))
    for each in found:
        if each.problem:
            say(one_line(each.problem))
    if not all(each.able for each in found):
        click.get_current_context().exit(CANNOT)


def _row(facts: HostFacts) -> tuple[str, ...]:
    from pytest_vmbottle.host.sizes import format_size

    able = "ok" if facts.able else "unable"
    free = format_size(facts.memory) if facts.memory else "-"
    return (facts.host, able, facts.accelerator or "-", free, str(len(facts.packs)), str(len(facts.machines)))
