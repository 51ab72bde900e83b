"""What the tests of faults share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import anyio
import pytest

from searchr1_async.local import LocalService
from tests.faults import scripted_world


@pytest.fixture(scope="module")
def scripted_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """One scripted service for all tests of a module, in a thread's event loop."""
    ready, over, found = threading.Event(), threading.Event(), list[LocalService]()

    async def serve() -> None:
        async with scripted_world.service(tmp_path_factory.mktemp("service")) as running:
            found.append(running)
            ready.set()
            await anyio.to_thread.run_sync(over.wait)

    thread = threading.Thread(target=anyio.run, args=(serve,))
    thread.start()
    assert ready.wait(120)
    yield found[0]
    over.set()
    thread.join()
