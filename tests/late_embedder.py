"""An embedder that opens when a test lets it, for searches that open beside other work."""

from __future__ import annotations

import anyio

from searchr1_async.testing import HashingEmbedder


class LateEmbedder(HashingEmbedder):
    """Opens once ``may_open`` is set, or then raises its ``failure``."""

    def __init__(self) -> None:
        super().__init__()
        self.may_open = anyio.Event()
        self.failure: Exception | None = None
        self.closings = 0

    async def open(self) -> None:
        await self.may_open.wait()
        if self.failure is not None:
            raise self.failure
        await super().open()

    async def aclose(self) -> None:
        self.closings += 1
        await super().aclose()
