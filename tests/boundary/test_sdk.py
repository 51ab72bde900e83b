"""The health of a Tinker service, and the SDK's errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text, probe
from searchr1_async.errors import ServiceUnavailableError
from searchr1_async.local.scripted_backend import ScriptedBackend
from tests.gateway import gateway
from tests.local.serving import Served, service_thread, successors

pytestmark = pytest.mark.anyio


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with service_thread(tmp_path / "service", ScriptedBackend(successors, model_name="scripted")) as found:
        yield found


async def test_a_gateway_whose_service_is_down_is_reported(served: Served) -> None:
    with gateway(served.url) as before:
        await probe(before.url, timeout=5)
        before.switch("fail")
        with pytest.raises(
            ServiceUnavailableError,
            match=r"500 Internal Server Error\): the service, or a proxy in front of it, is down",
        ):
            await probe(before.url, timeout=5)
        before.switch("silent")
        with pytest.raises(ServiceUnavailableError, match=r"did not answer within 0\.3 s"):
            await probe(before.url, timeout=0.3)


def test_faults_have_readable_texts() -> None:
    assert issubclass(RuntimeError, SDK_FAULTS)
    text = fault_text(
        ValueError("Error retrieving result: 401 for self.request_id='x' and expected type self.model_cls=<y>")
    )
    assert text == "ValueError: Error retrieving result: 401"
    full = fault_text(OSError(24, "Too many open files"))
    assert full.endswith("raise their limit (ulimit -n)")
    assert len(fault_text(ValueError("x" * 10_000))) <= 600
