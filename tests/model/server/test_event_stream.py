"""Streams to clients that take nothing, go away, or read to the end: each is ended once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from model.server.event_stream import DONE, EventStream, event

SCOPE = {"type": "http"}


def stream(events: AsyncIterator[bytes], stall_seconds: float = 60.0) -> tuple[EventStream, list[bool]]:
    """A stream, and what its end is told of."""
    ends: list[bool] = []
    return EventStream(events, {"X-Request-Id": "a"}, stall_seconds, ends.append), ends


async def numbers(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield event({"n": number})
        await asyncio.sleep(0)
    yield DONE


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    raise AssertionError


def test_a_client_that_reads_gets_all():
    sent = []

    async def send(message):
        sent.append(message)

    response, ends = stream(numbers(3))
    asyncio.run(response(SCOPE, never, send))
    assert ends == [False] and [message.get("more_body") for message in sent] == [None, True, True, True, True, False]
    assert b"".join(message.get("body", b"") for message in sent) == (
        b'data: {"n":0}\n\ndata: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    )
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8" and headers[b"x-request-id"] == b"a"
    assert b"content-length" not in headers


def test_a_client_that_takes_nothing_is_given_up():
    async def send(message):
        if message["type"] == "http.response.body":
            await never()

    response, ends = stream(numbers(3), stall_seconds=0.02)
    asyncio.run(response(SCOPE, never, send))
    assert ends == [True]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_client_that_goes_ends_the_stream_at_once(count):
    """Also where an event comes in the same turn of the loop."""
    sent: list[dict] = []
    gone = asyncio.Event()

    async def send(message):
        sent.append(message)
        if len(sent) > count:
            gone.set()

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    response, ends = stream(numbers(10**9))
    asyncio.run(asyncio.wait_for(response(SCOPE, receive, send), 60))
    assert ends == [False] and len(sent) < count + 10


def test_what_fails_in_a_stream_is_told_and_the_stream_ended():
    async def send(message):
        pass

    async def failing() -> AsyncIterator[bytes]:
        yield DONE
        raise ZeroDivisionError

    response, ends = stream(failing())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(response(SCOPE, never, send))
    assert ends == [False]
