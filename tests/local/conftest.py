"""A served scripted backend, one per test file, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import tinker

from tests.local.serving import Raw, Served, raw, sdk, service_thread


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with service_thread(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
async def service(served: Served) -> AsyncIterator[tinker.ServiceClient]:
    async with sdk(served.url) as service:
        yield service


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Raw]:
    async with raw(served.url) as client:
        yield client
