"""The service: who is let in, who waits, what state it is in."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zero.errors import UserError
from zero.serving.call import Call, TooSlow, Wanted
from zero.serving.metrics import Metrics
from zero.serving.problems import ApiError
from zero.serving.settings import ServingSettings
from zero.serving.worker import Loaded, PassFailed, Worker, WorkerDied

if TYPE_CHECKING:
    from zero.generation import Limits

logger = logging.getLogger("zero")

_LONGEST_RETRY_S = 60


class State(enum.Enum):
    """How far a service is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """A model behind a bounded queue. Everything but the passes happens in asyncio's thread.

    Args:
        load: makes the model; called in the passes' thread.
        settings: the limits.

    Attributes:
        settings: the limits.
        state: how far it is.
        metrics: what it counts.
        worker: the passes' thread.
        loaded_at: Unix time at which the model was there.
        num_open_choices: completions that wait or run.
        tokenizer_lock: held by whoever uses the tokenizer of ``loaded``.
        on_change: called after the state changed.
    """

    def __init__(self, load: Callable[[], Loaded], settings: ServingSettings) -> None:
        self.settings = settings
        self.state = State.LOADING
        self.metrics = Metrics()
        self.worker = Worker(load, self._worker_changed)
        self.loaded_at = 0
        self.num_open_choices = 0
        self.tokenizer_lock = threading.Lock()
        self.on_change: Callable[[], None] = lambda: None
        self._calls: set[Call] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mean_call_s = 1.0

    def start(self) -> None:
        """Begins to load; from inside the loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    @property
    def num_calls(self) -> int:
        """Requests that wait or run."""
        return len(self._calls)

    @property
    def loaded(self) -> Loaded:
        """The model.

        Raises:
            ApiError: 503 while it is not there, or no longer.
        """
        self.require_ready()
        loaded = self.worker.loaded
        if loaded is None:
            raise ApiError(503, "the model is not loaded", code="loading", retry_after_s=5)
        return loaded

    @property
    def limits(self) -> Limits:
        """Of the generator."""
        return self.loaded.generator.limits

    # -- requests ------------------------------------------------------------------------------------------------------

    async def begin(self, wanted: Wanted) -> Call:
        """Lets a request in, or refuses it.

        Raises:
            ApiError: 400 for what the model cannot do, 429 while the queue is full, 503 while no model is ready.
        """
        loaded = self.loaded
        self._check_size(wanted)
        self._require_room(wanted.num_choices)
        call = Call(wanted, self.settings.max_buffered_pieces, self._ended)
        self._calls.add(call)
        self.num_open_choices += wanted.num_choices
        try:
            # In another thread: a long text takes a tokenizer longer than others should wait for a byte.
            prompts = await asyncio.to_thread(self._encode, loaded, wanted)
            self.require_ready()
            self.worker.submit(call, prompts)
        except Exception as error:
            call.end(error)
            raise as_api_error(error) from None
        except BaseException as error:  # cancelled: the place in the queue is free again all the same
            call.end(error)
            raise
        return call

    def leave(self, call: Call) -> None:
        """Nobody waits for this answer any more; its rows are freed at the next pass border."""
        call.is_abandoned = True
        if not call.has_ended:
            self.worker.cancel(call)

    def _check_size(self, wanted: Wanted) -> None:
        most = min(self.settings.max_choices, self._most_choices())
        if wanted.num_choices > most:
            raise ApiError(
                400,
                f"{wanted.num_choices} completions (prompts times n); one request may ask for at most {most}",
                param="n",
                code="too_many_choices",
            )
        longest = self.limits.max_tokens
        for prompt in wanted.prompts:  # before the tokenizer: what is too long by any count
            if isinstance(prompt, list):
                check_length(len(prompt), wanted.sampling.max_new_tokens, longest)

    def _encode(self, loaded: Loaded, wanted: Wanted) -> list[list[int]]:
        prompts = [loaded.generator.encode(prompt) for prompt in wanted.prompts]
        for prompt in prompts:
            check_length(len(prompt), wanted.sampling.max_new_tokens, loaded.generator.limits.max_tokens)
        return prompts

    def _most_choices(self) -> int:
        return self.limits.max_rows + self.settings.max_queue

    def _require_room(self, num_choices: int) -> None:
        if self.num_open_choices + num_choices > self._most_choices():
            self.metrics.refused += 1
            raise ApiError(
                429,
                f"the queue is full: {self.num_open_choices} completions run or wait, and at most "
                f"{self._most_choices()} may; try again later",
                code="queue_full",
                retry_after_s=self.retry_after_s(),
            )

    def retry_after_s(self) -> int:
        """About when the next place in the queue is free, from how long requests took lately."""
        rows = 1 if self.worker.loaded is None else max(1, self.worker.loaded.generator.limits.max_rows)
        waiting = max(1, self.num_open_choices - rows)
        return max(1, min(_LONGEST_RETRY_S, math.ceil(self._mean_call_s * waiting / rows)))

    def _ended(self, call: Call) -> None:
        """The rows of a request are free."""
        if call not in self._calls:
            return
        self._calls.discard(call)
        self.num_open_choices -= call.wanted.num_choices
        if call.jobs and call.error is None and not call.is_abandoned:
            call_s = time.monotonic() - call.started_s
            self._mean_call_s += 0.2 * (call_s - self._mean_call_s)
            self.metrics.answered(call_s, call.first_token_s)
        elif call.jobs:
            self.metrics.left(call.is_abandoned)

    # -- state ---------------------------------------------------------------------------------------------------------

    def require_ready(self) -> None:
        """Lets requests on only while there is a model to ask.

        Raises:
            ApiError: 503.
        """
        if self.state is State.READY:
            return
        texts = {
            State.LOADING: "the model is still being loaded; /readyz says when it is there",
            State.DRAINING: "the service is being stopped and takes no more requests",
            State.FAILED: "the service has failed and is about to end",
        }
        raise ApiError(503, texts[self.state], code=self.state.value, retry_after_s=5)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets those under way finish, and ends what is left after the time."""
        if self.state is not State.FAILED:
            self._become(State.DRAINING)
        end_s = time.monotonic() + timeout_s
        while self._calls and time.monotonic() < end_s and self.worker.is_alive:
            await asyncio.sleep(0.02)
        for call in list(self._calls):
            if call.jobs:
                self.worker.cancel(call)
            call.fail(ApiError(503, "the service was stopped before the answer was complete", code="draining"))

    def _worker_changed(self) -> None:
        """Called in the passes' thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._look_at_worker)

    def _look_at_worker(self) -> None:
        if self.worker.failure is not None:
            self._become(State.FAILED)
        elif self.worker.loaded is not None and self.state is State.LOADING:
            self.loaded_at = int(time.time())
            self._become(State.READY)

    def _become(self, state: State) -> None:
        if self.state is not state:
            self.state = state
            self.on_change()

    def status(self) -> dict[str, Any]:
        """What the page shows: state, queue, speed, memory."""
        worker, loaded = self.worker, self.worker.loaded
        status: dict[str, Any] = {"model": self.settings.model_name, "state": self.state.value}
        if loaded is None:
            return status
        now = loaded.generator.statistics
        template = getattr(loaded.tokenizer, "chat_template", None)
        status["has_chat_template"] = template is not None
        status["max_tokens"] = loaded.generator.limits.max_tokens
        status["queue"] = {
            "num_waiting": now.num_waiting,
            "num_rows": now.num_rows,
            "max_rows": loaded.generator.limits.max_rows,
            "max_queue": self.settings.max_queue,
        }
        status["num_new_tokens"] = now.num_new_tokens
        status["tokens_per_s"] = round(now.tokens_per_s, 3)
        status["memory"] = {**vars(worker.memory), "cache_bytes": now.cache_bytes}
        return status


def check_length(num_prompt_tokens: int, num_new_tokens: int, longest: int | None) -> None:
    """Refuses what the model has no positions for; None: it has as many as one likes.

    Raises:
        ApiError: 400 with the numbers.
    """
    if longest is not None and num_prompt_tokens + num_new_tokens > longest:
        room = max(0, longest - num_prompt_tokens)
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {num_new_tokens}; the model reads at most "
            f"{longest} in all, so max_tokens may be at most {room}",
            param="max_tokens" if room else "prompt",
            code="context_length_exceeded",
        )


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any failure; nothing of the inside of the program."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, PassFailed):
        if error.is_out_of_memory:
            return ApiError(503, "no memory was left for this request", code="out_of_memory", retry_after_s=5)
        return ApiError(500, "a pass through the model failed; the log of the service says why", code="pass_failed")
    if isinstance(error, WorkerDied):
        return ApiError(503, "the service has failed and is about to end", code="failed", retry_after_s=5)
    if isinstance(error, TooSlow):
        return ApiError(503, "the stream was read too slowly, and was ended", code="too_slow")
    # Where it happened, without the error's own words: they may quote a prompt.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s, while answering a request\n%s", type(error).__name__, where)
    return ApiError(500, "the service made a mistake; its log says which", code="internal")
