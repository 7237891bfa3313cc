"""The OpenAPI document, tried out by schemathesis: 2,000 requests that it allows or forbids, none of which the service fails at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.service.running import PATIENCE

if TYPE_CHECKING:
    from tests.service.running import Service

CASES = int(os.environ.get("CASES", "2000"))
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance),
    *(negative_data_rejection, unsupported_method),
]
LONGEST = 2
SLOW = {"pause", "reboot", "start", "stop", "restore", "snapshot"}
"""Actions that end or replace the machine, or take long; the other tests have them."""


@pytest.fixture(scope="module")
def web(service: Service) -> Iterator[str]:
    name = f"document{os.getpid()}"
    service.create(name)
    yield name
    service.ask("DELETE", f"/vms/{name}")


def _is_harmless(case: Any) -> bool:
    """Leaves out what would end the machine, wait for minutes, or start machines by the hundred."""
    body = case.body if isinstance(case.body, dict) else {}
    if case.operation.method.upper() == "POST" and case.operation.path == "/vms/":
        return "base_image" not in body
    if body.get("action") in SLOW:
        return False
    # Seconds that a request asks to wait.
    waits = (body.get("timeout"), (case.query or {}).get("seconds"))
    return all(not isinstance(each, int | float) or each <= LONGEST for each in waits)


def _aim(case: Any, name: str) -> None:
    """Has a request reach a real machine, unless its path is what is invalid; one that removes reaches none."""
    modes = {getattr(key, "value", key): about.mode for key, about in case.meta.components.items()}
    if case.path_parameters and "id" in case.path_parameters and modes.get("path") is not schemathesis.GenerationMode.NEGATIVE:
        case.path_parameters["id"] = name if case.operation.method.upper() != "DELETE" else "nobody"


@pytest.mark.timeout(3600)
def test_no_request_makes_the_service_fail_or_answer_otherwise_than_its_document_says(service: Service, web: str) -> None:
    document = service.get("/openapi.json").json
    # The token comes with all of them: other tests leave it out.
    del document["security"], document["components"]["securitySchemes"]
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    strategies = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in schemathesis.GenerationMode]
    seen = 0

    @seed(20260101)
    @settings(max_examples=CASES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.one_of(strategies))
    def tried(case: Any) -> None:
        nonlocal seen
        if _is_harmless(case):
            seen += 1
            # Half of them: what reaches the guest takes a moment there.
            if seen % 2:
                _aim(case, web)
            elif case.operation.method.upper() == "DELETE":
                return
            case.call_and_validate(base_url=service.url.rstrip("/"), headers=service.bearer, checks=CHECKS, timeout=PATIENCE)

    tried()
    assert seen > CASES * 0.8
    assert service.process.poll() is None
    assert service.sh(web, "uname") == "Linux\n"
