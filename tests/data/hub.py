"""The Hugging Face hub's way of giving a large file: a description, a redirect to another server, and byte ranges."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from aiohttp import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked. Files come from a second server, as from the hub's CDN."""

    files: dict[str, bytes]
    repository: str = "someone/an-index"
    checksum: str | None = None
    """Told in place of the right one."""
    cuts: list[int] = field(default_factory=list)
    """Each large answer ends after so many bytes, until the list is used up."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers of the CDN."""
    retry_after: str | None = None
    """Sent with each of those."""
    hold_after: int | None = None
    """The next large answer stays unfinished after so many bytes."""
    url: str = ""
    cdn: str = ""
    answers: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Of each file, first byte and number of bytes sent; looks at its end (4 KB at most) left out."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """Which server was asked with which token."""

    @property
    def requests(self) -> int:
        return len(self.tokens)

    async def describe(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(("hub", request.headers.get("Authorization")))
        content = self.files.get(request.match_info["filename"])
        known = request.match_info["repository"] == self.repository
        revision_known = request.match_info["revision"] in ("main", COMMIT)
        if content is None or not known or not revision_known:
            code = "RepoNotFound" if not known else "EntryNotFound" if revision_known else "RevisionNotFound"
            return web.Response(status=404, headers={"X-Error-Code": code, "X-Error-Message": "no such thing"})
        digest = self.checksum or hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.cdn}/blob/{request.match_info['filename']}?signature=secret",
        }
        return web.Response(status=302, headers=headers)

    async def give(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(("cdn", request.headers.get("Authorization")))
        if self.failures:
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return web.Response(status=self.failures.pop(0), headers=headers)
        content = self.files[request.match_info["filename"]]
        if "Range" not in request.headers:  # the hub's own client asks for a small file whole
            self.answers.setdefault(request.match_info["filename"], []).append((0, len(content)))
            return web.Response(body=content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
        assert asked, request.headers["Range"]
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", "Content-Length": str(end - start)}
        answer = web.StreamResponse(status=206, headers=headers)
        await answer.prepare(request)
        is_large = end - start > 4_096
        count = min(end - start, self.cuts.pop(0)) if is_large and self.cuts else end - start
        hold, self.hold_after = (self.hold_after, None) if is_large else (None, self.hold_after)
        count = count if hold is None else min(count, hold)
        await answer.write(content[start : start + count])
        if is_large:
            self.answers.setdefault(request.match_info["filename"], []).append((start, count))
        if hold is not None:
            await anyio.sleep_forever()  # the server's end cancels it
        if count < end - start and request.transport is not None:
            request.transport.close()
        return answer


@asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[Hub]:
    site, cdn = web.Application(), web.Application()
    site.router.add_route("*", "/datasets/{repository:[^/]+/[^/]+}/resolve/{revision}/{filename:.+}", hub.describe)
    cdn.router.add_get("/blob/{filename:.+}", hub.give)
    runners: list[web.AppRunner] = []
    try:
        for app in (site, cdn):
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        # Another host, not only another port: the hub's client follows redirects within one by itself.
        hub.url, hub.cdn = (
            f"http://{host}:{runner.addresses[0][1]}"
            for host, runner in zip(("127.0.0.1", "localhost"), runners, strict=True)
        )
        yield hub
    finally:
        for runner in runners:
            await runner.cleanup()
