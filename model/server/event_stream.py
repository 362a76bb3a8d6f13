"""Server-sent events (WHATWG HTML, section 9.2) to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # Proxies of nginx's kind keep answers together otherwise.
    "X-Accel-Buffering": "no",
}
DONE = b"data: [DONE]\n\n"
# A comment: shows proxies, while a client waits for a slot, that somebody is there.
COMMENT = b": waiting\n\n"


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def gone(receive: Receive) -> None:
    """Return when the client has gone; its request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what `events` gives while the client takes it.

    `on_end` is called once, whatever ended it, with whether the client took nothing for `stall_seconds`. Then the
    connection is left: what the system still holds for the client is not waited for.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        headers: dict[str, str],
        stall_seconds: float,
        on_end: Callable[[bool], None],
    ):
        super().__init__(status_code=200, headers={**HEADERS, **headers})
        # Its length is not known before its end.
        del self.headers["content-length"]
        self._events, self._stall_seconds, self._on_end = events, stall_seconds, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(gone(receive))
        stalled = False
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        except TimeoutError:
            stalled = True
        finally:
            for task in (sending, watching):
                task.cancel()
            self._on_end(stalled)
            await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for content in self._events:
            await self._patiently(send, content, more=True)
        await self._patiently(send, b"", more=False)

    async def _patiently(self, send: Send, content: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": content, "more_body": more}
        async with asyncio.timeout(self._stall_seconds):
            await send(message)
