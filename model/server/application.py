"""The HTTP interface: paths, bodies, statuses."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from importlib.resources import files

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from model.server.answer import Answer
from model.server.errors import ApiError
from model.server.event_stream import COMMENT, DONE, EventStream, event, gone
from model.server.responses import ChatCompletion, TextCompletion
from model.server.service import PreparedRequest, Service

# A stream says this often that it is there while its client waits.
COMMENT_SECONDS = 15.0
PAGE_HEADERS = {
    # The page is one file and asks this server alone.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def application(service: Service) -> Starlette:
    """The ASGI application that answers for `service`."""
    page = files("model.server").joinpath("page.html").read_text(encoding="utf-8")

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    async def health(_: Request) -> Response:
        status = "failed" if service.has_failed else "draining" if service.admission.draining else "ok"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != service.model.name:
            raise ApiError(404, f"there is no model {name!r} here; it is {service.model.name}", code="model_not_found")
        return JSONResponse(service.card())

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", Completions(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Completions(service, chat=True), methods=["POST"]),
    ]
    return Starlette(
        routes=routes, exception_handlers={ApiError: _refused, HTTPException: _not_found, Exception: _failed}
    )


class Completions:
    """POST of a completion or a chat, as an ASGI application: it is there until the last byte is sent."""

    def __init__(self, service: Service, chat: bool):
        self._service, self._chat = service, chat
        self._path = "/v1/chat/completions" if chat else "/v1/completions"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        count = functools.partial(self._service.metrics.responses.labels, self._path)
        try:
            with self._service.admission.request():
                response = await self._answer(Request(scope, receive))
                if response is None:
                    return
                count(str(response.status_code)).inc()
                await response(scope, receive, send)
        except ApiError as error:
            count(str(error.status)).inc()
            await _as_response(error)(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """None: the client has gone. Raises ApiError."""
        try:
            body = await _read_body(request, self._service.limits.max_body_bytes, self._service.limits.stall_seconds)
        except ClientDisconnect:
            return None
        prepared = await self._service.prepare(body, self._chat)
        answer = self._service.begin(prepared)
        shape = self._shape(prepared)
        headers = {"X-Request-Id": shape.id}
        if not prepared.request.stream:
            return await self._whole(request, answer, shape, headers)
        events = _events(answer, shape, prepared)
        return EventStream(
            events, headers, self._service.limits.stall_seconds, functools.partial(self._service.end, answer)
        )

    def _shape(self, prepared: PreparedRequest) -> TextCompletion | ChatCompletion:
        if self._chat:
            return ChatCompletion(self._service.model.name, self._service.spell)
        echoes = {
            number * prepared.request.n + repeat: text
            for number, text in enumerate(prepared.texts)
            for repeat in range(prepared.request.n)
        }
        return TextCompletion(self._service.model.name, self._service.spell, echoes)

    async def _whole(
        self, request: Request, answer: Answer, shape: TextCompletion | ChatCompletion, headers: dict[str, str]
    ) -> Response | None:
        watching = asyncio.create_task(gone(request.receive))
        waiting = asyncio.create_task(_until_ended(answer))
        try:
            await asyncio.wait({waiting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if answer.error is not None:
                raise answer.error
            return JSONResponse(shape.whole(answer), headers=headers) if answer.has_ended else None
        finally:
            watching.cancel()
            waiting.cancel()
            self._service.end(answer)


async def _until_ended(answer: Answer) -> None:
    while not answer.has_ended:
        await answer.changed()


async def _events(
    answer: Answer, shape: TextCompletion | ChatCompletion, prepared: PreparedRequest
) -> AsyncIterator[bytes]:
    """What a stream sends. Tokens that came while the client was not reading come together."""
    request = prepared.request

    def spelled(content: dict[str, object]) -> bytes:
        if request.continuous_usage:
            content["usage"] = answer.usage()
        elif request.include_usage:
            content.setdefault("usage", None)
        return event(content)

    for choice in answer.choices:
        for content in shape.opening(choice):
            yield spelled(content)
    open_choices = list(answer.choices)
    while open_choices:
        if not await answer.changed(COMMENT_SECONDS):
            yield COMMENT
            continue
        for choice in list(open_choices):
            has_ended = choice.has_ended
            if piece := choice.read():
                yield spelled(shape.chunk(choice, piece))
            if has_ended and answer.error is None:
                open_choices.remove(choice)
                yield spelled(shape.closing(choice))
        if answer.error is not None:
            yield event(answer.error.body)
            return
    if request.include_usage:
        yield event(shape.usage(answer))
    yield DONE


async def _read_body(request: Request, most: int, stall_seconds: float) -> bytes:
    """Raises ApiError: 408, 413 or 415; ClientDisconnect."""
    # A page of another site may send other types without asking the browser's user.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type must be application/json")
    length = request.headers.get("content-length", "")
    too_long = ApiError(413, f"the body is longer than the {most} bytes that are taken here")
    if length.isdecimal() and int(length) > most:
        raise too_long
    body, parts = bytearray(), request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(stall_seconds):
                body += await anext(parts)
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"nothing of the body came for {stall_seconds:g} seconds") from None
        if len(body) > most:
            raise too_long


def _as_response(error: ApiError) -> Response:
    # What is left of a body that was not read would be taken for the next request.
    headers = {**error.headers, **({"Connection": "close"} if error.status in (408, 413, 503) else {})}
    return Response(error.content, error.status, headers, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _as_response(error)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not answered here"}
    response = _as_response(ApiError(error.status_code, texts.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _failed(_: Request, error: Exception) -> Response:
    return _as_response(ApiError(500, f"the server failed: {type(error).__name__}"))
