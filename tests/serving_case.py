"""What the tests of the service share: a generator without a model, and a service on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from zero.errors import UserError
from zero.generation import GenerationStatistics, Job, Limits, Piece, Sampling, TokenLogprob
from zero.serving import Loaded, Memory, Service, ServingSettings, make_app

KEY = "a-key-for-tests"


class FakeTokenizer:
    """Every byte is a token."""

    chat_template: str | None = None

    def __len__(self) -> int:
        return 256

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        if turns[0]["role"] == "assistant":
            raise RuntimeError("a chat begins with the user")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def says(sampling: Sampling, index: int) -> str:
    """What the fake model answers: the settings it was asked with, again and again."""
    seed = None if sampling.seed is None else sampling.seed + index
    return f"<{sampling.temperature}|{sampling.top_k}|{sampling.top_p}|{sampling.repetition_penalty}|{seed}>" * 40


class FakeGenerator:
    """The interface of zero.generation.Generator; each pass adds one character to each running choice.

    Attributes:
        pass_s: that a pass takes.
        failure: raised by the next pass, once.
        keeps_failing: raised by every pass.
        text: what is answered instead of the settings.
    """

    def __init__(self, limits: Limits | None = None, pass_s: float = 0.0) -> None:
        self.limits = limits or Limits(max_rows=4, max_tokens=256)
        self.pass_s = pass_s
        self.failure: BaseException | None = None
        self.keeps_failing: BaseException | None = None
        self.text: str | None = None
        self.most_rows = 0
        self.num_encoded = 0
        self._lock = threading.Lock()
        self._cancelled: list[Job] = []
        self._waiting: list[tuple[Job, int]] = []
        self._rows: list[tuple[Job, int]] = []
        self._counts = {"num_passes": 0, "num_new_tokens": 0, "num_prompt_tokens": 0}

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        self.num_encoded += 1
        tokens = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise UserError("the prompt is empty")
        if max(tokens) >= 256:
            raise UserError("prompt: token numbers go from 0 to 255")
        return tokens

    def submit(
        self, prompt: Any, sampling: Sampling, n: int = 1, on_piece: Callable[[Piece], None] | None = None
    ) -> Job:
        job = Job(tuple(self.encode(prompt)), sampling, n, on_piece)
        with self._lock:
            self._waiting += [(job, index) for index in range(n)]
        return job

    def cancel(self, job: Job) -> None:
        with self._lock:
            self._cancelled.append(job)

    def run_pass(self) -> bool:
        with self._lock:
            for job, index in [*self._waiting, *self._rows]:
                if job in self._cancelled:
                    self._leave(job, index, Piece(index, "", finish_reason="cancelled"))
            self._cancelled.clear()
            room = self.limits.max_rows - len(self._rows)
            self._rows += self._waiting[:room]
            del self._waiting[:room]
            rows = list(self._rows)
        self.most_rows = max(self.most_rows, len(rows))
        if not rows:
            return False
        time.sleep(self.pass_s)
        failure, self.failure = self.failure or self.keeps_failing, None
        if failure is not None:
            raise failure
        self._counts["num_passes"] += 1
        for job, index in rows:
            self._step(job, index)
        return True

    def _step(self, job: Job, index: int) -> None:
        choice, sampling = job.choices[index], job.sampling
        place = len(choice.tokens)
        text = (self.text or says(sampling, index))[place]
        self._counts["num_new_tokens"] += 1
        reason = "length" if place + 1 == sampling.max_new_tokens else None
        if any((choice.text + text).endswith(stop) for stop in sampling.stop):
            text, reason = "", "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            top = tuple((ord("a") + k, chr(ord("a") + k), -1.0 - k) for k in range(sampling.logprobs))
            logprobs = (TokenLogprob(ord(text or "?"), text, float("-inf") if place else -0.5, top),)
        piece = Piece(index, text, (ord(text or "?"),), logprobs, reason)
        if reason is None:
            job.add(piece)
        else:
            with self._lock:
                self._leave(job, index, piece)

    def _leave(self, job: Job, index: int, last: Piece) -> None:
        for rows in (self._waiting, self._rows):
            if (job, index) in rows:
                rows.remove((job, index))
        job.add(last)
        job.settle()

    @property
    def statistics(self) -> GenerationStatistics:
        with self._lock:
            cache_bytes = 1000 * len(self._rows)
            return GenerationStatistics(
                num_waiting=len(self._waiting), num_rows=len(self._rows), cache_bytes=cache_bytes, **self._counts
            )


class Running:
    """A service that listens on a port of this machine.

    Attributes:
        service: the service.
        url: where it is.
        generator: inside of it.
    """

    def __init__(self, service: Service, generator: Any, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.service = service
        self.generator = generator
        self.url = url
        self.loop = loop

    def get(self, path: str, **headers: str) -> Reply:
        return fetch(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return fetch(urllib.request.Request(self.url + path, data=data, headers=headers))

    def complete(self, **body: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": "hello", **body})

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """All events of a stream; the last one of the wire has to be [DONE]."""
        body = {**({"prompt": "hello"} if path == "/v1/completions" else {}), "stream": True, **body}
        reply = self.post(path, body)
        assert reply.status == 200, reply.text
        events = [part[6:] for part in reply.text.split("\n\n") if part.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def is_free(self, within_s: float = 5.0) -> bool:
        """Whether no row, no byte of cache and no place in the queue is taken."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            now = self.generator.statistics
            taken = (now.num_rows, now.num_waiting, now.cache_bytes, self.service.num_open_choices)
            if not any(taken) and not self.service.num_calls:
                return True
            time.sleep(0.01)
        return False


class Reply:
    """Status, headers and body of a reply."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.text = body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error inside, which has OpenAI's shape and no trace of the program."""
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in self.text
        assert ".py" not in self.text
        return error


def fetch(request: urllib.request.Request) -> Reply:
    """The reply, whatever its status."""
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Reply(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.headers, error.read())


@contextlib.contextmanager
def serving(
    generator: Any = None,
    tokenizer: Any = None,
    load: Callable[[], Loaded] | None = None,
    is_ready: bool = True,
    **settings: Any,
) -> Iterator[Running]:
    """A service around a generator, real enough: a socket, uvicorn, the passes' thread; only signals are missing."""
    generator = generator or FakeGenerator()
    loaded = Loaded(generator, tokenizer or FakeTokenizer(), lambda: Memory(1 << 30, 1 << 28, 1 << 27, 1 << 26, 0))
    service = Service(load or (lambda: loaded), ServingSettings("fake", port=0, **settings))
    config = uvicorn.Config(
        make_app(service), port=0, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None,
        access_log=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        service.start()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    if is_ready:
        until(lambda: service.state.value == "ready")
    try:
        yield Running(service, generator, f"http://127.0.0.1:{port}", loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
        service.worker.stop(10)


def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Waits for a condition."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that in time"
        time.sleep(0.002)
