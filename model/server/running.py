"""The process that listens: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from conf.problems import ConfigError
from model.server.application import application
from model.server.service import Service
from model.server.worker import BatchWorker

BACKLOG = 1024
SEND_BUFFER = 2**17
# After the last answer, for what the system still has to send.
CLOSING_SECONDS = 1
# How often a drain looks whether answers are left.
DRAIN_INTERVAL = 0.05
# Seconds for which a thread may keep the others waiting; 5 ms, Python's own value, would be most of a decoding step.
SWITCH_INTERVAL = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet; port 0: any that is free. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError([f"host: {host} is no address of this machine ({error})"]) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError([_why_not(error, host, port)]) from None
    return listener


def listen(listener: socket.socket, stall_seconds: float) -> None:
    """Let connections come. Raises ConfigError: another process was faster. Connections take over the options."""
    # What the system holds of an answer that is not read; by itself it takes megabytes for each connection.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    # Clients that vanished without a word are found.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A client that takes nothing while what it is sent still fits into the buffer, or after it was given up: where the
    # system can, it ends the connection, some time behind us.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = min(2**31 - 1, int((2 * stall_seconds + 1) * 1000))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError([_why_not(error, host, port)]) from None


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {port} of {host} is in use by another process; give another one, or port=0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port: {port} may not be used by this user; give one from 1024 to 65535"
    return f"host: cannot listen at {host}, port {port} ({error.strerror})"


def url(listener: socket.socket) -> str:
    """Of the server at `listener`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, worker: BatchWorker, listener: socket.socket, announce: Callable[[], None]) -> int:
    """Answer until a signal, or until the model fails; returns 0, or 1 where it failed.

    `announce` is called when requests are answered. SIGTERM and SIGINT end it gracefully: requests are refused from
    then on, running answers may end within `drain_seconds`. A second signal ends these at once.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        return asyncio.run(_run(service, worker, listener, announce))
    finally:
        sys.setswitchinterval(before)


async def _run(service: Service, worker: BatchWorker, listener: socket.socket, announce: Callable[[], None]) -> int:
    loop = asyncio.get_running_loop()
    server = _Server(application(service), announce)
    hurry = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def end() -> None:
        if tasks:
            hurry.set()
        else:
            tasks.add(loop.create_task(_drain(service, server, hurry)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    worker.start(loop, on_failure=end)
    try:
        await server.serve(sockets=[listener])
        await asyncio.gather(*tasks)
    finally:
        # A step may take a while; the signals above still work.
        await asyncio.to_thread(worker.stop)
        service.close()
    return 1 if service.has_failed else 0


async def _drain(service: Service, server: _Server, hurry: asyncio.Event) -> None:
    service.admission.draining = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.limits.drain_seconds
    if service.admission.requests:
        print(f"draining: {service.admission.requests} requests are being answered", file=sys.stderr, flush=True)
    while service.admission.requests and loop.time() < deadline and not hurry.is_set():
        await asyncio.sleep(DRAIN_INTERVAL)
    if broken := service.break_off():
        print(f"broke off {broken} answers that had not ended", file=sys.stderr, flush=True)
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn with our signals in the place of its own, which stop listening at once."""

    def __init__(self, app: Starlette, announce: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                backlog=BACKLOG,
                access_log=False,
                log_level="error",
                server_header=False,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
