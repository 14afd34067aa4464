"""A service as a process: the socket, the signals, the way out."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from zero.errors import UserError
from zero.serving.app import make_app
from zero.serving.service import Service, State
from zero.serving.settings import ServingSettings
from zero.serving.worker import Loaded

logger = logging.getLogger("zero")

_LAST_REPLIES_S = 5
_PASS_S = 60.0


class ServiceFailed(RuntimeError):
    """The thread of the passes has ended; a supervisor may start the process anew."""


def serve(load: Callable[[], Loaded], settings: ServingSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, and then until what runs is answered.

    Args:
        load: makes the model, while the service listens already.
        settings: the limits.
        say: prints a line.

    Raises:
        UserError: the address cannot be had, or the model cannot be loaded.
        ServiceFailed: passes keep failing, or their thread has died.
    """
    listener = listen(settings.host, settings.port)
    service = Service(load, settings)
    asyncio.run(_serve(service, listener, say))
    failure = service.worker.failure
    if failure is None and service.worker.is_alive:
        _leave(0)  # it loads, or a pass takes longer than anybody waits: neither can be interrupted
    if failure is not None and service.worker.loaded is None:
        raise failure  # a user's error, most often: the command line says it
    if failure is not None:
        raise ServiceFailed(f"passes through the model failed: {type(failure).__name__}: {failure}") from failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is taken, not allowed, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        hint = "give another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else "give another --host"
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; {hint}") from error
    return listener


def _leave(exit_code: int) -> None:
    """Ends the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


async def _serve(service: Service, listener: socket.socket, say: Callable[[str], None]) -> None:
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_REPLIES_S,
    )
    # Its warnings are about single requests of others; nothing in them is for whoever runs the service.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(config, service)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    name = service.settings.model_name

    def changed() -> None:
        if service.state is State.READY:
            plan = service.worker.loaded.plan if service.worker.loaded is not None else ""
            say(f"{name} at {address} ({plan})" if plan else f"{name} at {address}")
        elif service.state is State.FAILED:
            server.stop()

    def started() -> None:
        service.start()
        logger.info("%s listens and loads %s; %s/readyz says when it is there", address, name, address)

    service.on_change = changed
    server.on_start = started
    await server.serve(sockets=[listener])
    if service.worker.loaded is not None:
        await asyncio.to_thread(service.worker.stop, _PASS_S)


class _Server(uvicorn.Server):
    """uvicorn, which drains before it stops: it goes on listening, so that whoever comes is told so."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Task[None] | None = None
        self.on_start: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens; signals are ours by then."""
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM and SIGINT; called between two instructions of the main thread."""
        del frame
        if self._stopping is not None:
            # Asked twice: now. The passes' thread may be in the middle of one that takes seconds.
            sys.stderr.write(f"zero: {signal.Signals(sig).name} again: ended at once\n")
            _leave(128 + sig)
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Drains and ends."""
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        if service.num_calls:
            logger.info("stopping: %d requests may finish, for %g s", service.num_calls, service.settings.drain_s)
        await service.drain(service.settings.drain_s)
        self.should_exit = True
