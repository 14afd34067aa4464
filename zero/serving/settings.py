"""What a service may be asked for, and how much of it at a time."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from zero.errors import UserError


@dataclass(frozen=True)
class ServingSettings:
    """The limits of a service; everything here is checked before tokenizer and model see a request.

    Attributes:
        model_name: under which the model is served.
        host: address to listen on.
        port: 0 takes a free one.
        api_key: without it nobody is answered; None: no key is needed, which only a loopback address may go without.
        max_queue: completions that may wait beside those that run; one more is answered 429.
        deadline_s: from a request's arrival to its last byte; then 504.
        drain_s: how long running requests may go on after SIGTERM.
        max_body_bytes: of a request; above it 413.
        body_s: in which a request's body has to arrive; then 408.
        max_choices: completions of one request: prompts times n.
        max_buffered_pieces: of a stream whose client reads slower than the model writes; then it is cancelled.
        keep_alive_s: between comments in a stream that has nothing to say, so that proxies keep it open.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 64
    deadline_s: float = 600.0
    drain_s: float = 30.0
    max_body_bytes: int = 1 << 20
    body_s: float = 30.0
    max_choices: int = 16
    max_buffered_pieces: int = 4096
    keep_alive_s: float = 15.0

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            UserError: says which option, what was given and what is allowed.
        """
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port {self.port}: must be from 0 (a free one) to 65535")
        if self.max_queue < 0:
            raise UserError(f"--max-queue {self.max_queue}: must be 0 or more")
        if not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            raise UserError(f"--deadline-s {self.deadline_s}: must be a number of seconds above 0")
        if self.api_key is not None and not _can_be_sent(self.api_key):
            raise UserError("--api-key: must be of visible ASCII characters, without spaces")
        if self.api_key is None and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host}: others than this machine can reach it, so a key is needed: set the environment "
                "variable ZERO_API_KEY (or give --api-key), or stay on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address: ``localhost``, 127.0.0.0/8 or ::1."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _can_be_sent(key: str) -> bool:
    """Whether a key survives an HTTP header."""
    return bool(key) and all(33 <= ord(character) <= 126 for character in key)
