"""`zero serve` with a real, tiny model: in this process, and as a process of its own with its signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_case import write_config
from serving_case import KEY, Reply, Running, fetch, serving, until

from zero.cli.main import main
from zero.cli.serve import model_of, served_name
from zero.generation import Limits

ROOT = Path(__file__).resolve().parent.parent
# Room for keys and values beside the model: nothing is streamed.
ROOMY = {"device": {"type": "simulated", "memory": "64MiB"}}

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A tiny OPT with random weights, of 32 positions, behind a service."""
    from zero.serving.loading import load

    config = model_of(write_config(tmp_path_factory.mktemp("config"), **ROOMY), {})
    loaded: list[Any] = []

    def once() -> Any:
        loaded.append(load(config, Limits(max_rows=4)))
        return loaded[0]

    with serving(object(), load=once) as running:
        running.generator = loaded[0].generator
        yield running


class TestInThisProcess:
    def test_greedy_text_is_the_same_however_it_is_asked_for(self, real: Running) -> None:
        settings = {"prompt": "The", "max_tokens": 12, "temperature": 0}
        whole = real.complete(**settings).json
        [choice] = whole["choices"]
        streamed = "".join(event["choices"][0]["text"] for event in real.stream(**settings))
        assert streamed == choice["text"]
        generated = real.post("/generation", {"prompt": "The", "max_tokens": 12, "top_k": 1}).json
        assert generated["text"] == "The" + choice["text"]
        assert whole["usage"]["completion_tokens"] <= 12
        assert choice["finish_reason"] in ("stop", "length")

    def test_settings_do_not_leak_between_requests(self, real: Running) -> None:
        asked = [
            {"prompt": f"Once {'upon ' * (number % 4)}", "max_tokens": 4 + number % 9, "seed": number,
             "temperature": (0, 0.7, 1.5)[number % 3], "top_k": (0, 5)[number % 2], "n": 1 + number % 2}
            for number in range(24)
        ]  # fmt: skip
        alone = [real.complete(**settings).json["choices"] for settings in asked]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda settings: real.complete(**settings).json["choices"], asked))
        assert together == alone
        assert real.is_free()

    def test_logprobs_are_of_the_tokens_in_the_text(self, real: Running) -> None:
        [choice] = real.complete(prompt="The", max_tokens=5, temperature=0, logprobs=3).json["choices"]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
        for token, value, top in zip(
            *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            assert len(top) <= 3
            assert top[token] == pytest.approx(value), "the likeliest was taken"

    def test_leaving_frees_rows_and_cache(self, real: Running) -> None:
        for number in range(12):
            address = real.url.removeprefix("http://").split(":")
            body = json.dumps({"prompt": "The", "max_tokens": 28, "stream": bool(number % 2)}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            with socket.create_connection((address[0], int(address[1]))) as client:
                client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.005 * (number % 4))
        assert real.is_free()
        statistics = real.generator.statistics
        assert (statistics.num_rows, statistics.num_waiting, statistics.cache_bytes) == (0, 0, 0)

    def test_too_long_for_the_model(self, real: Running) -> None:
        reply = real.complete(prompt="word " * 60)
        assert reply.status == 400
        assert "at most 32" in reply.error["message"]
        reply = real.complete(prompt=[5, 6], max_tokens=31)
        assert "max_tokens may be at most 30" in reply.error["message"]

    def test_status_says_where_the_bytes_are(self, real: Running) -> None:
        real.complete(max_tokens=2)
        memory = real.get("/status").json["memory"]
        assert memory["device_capacity_bytes"] == 64 << 20
        assert memory["model_device_bytes"] + memory["model_host_bytes"] > 300_000
        assert 0 < memory["device_peak_bytes"] <= 64 << 20


class Process:
    """A service as a program of its own."""

    def __init__(self, command: list[str], **environment: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)
        first = self.line(self.process.stderr, "listens")
        self.url = re.findall(r"http://[\d.:]+", first)[0]

    @staticmethod
    def line(stream: Any, word: str) -> str:
        """The next line with a word in it."""
        for line in stream:
            if word in line:
                return str(line)
        raise AssertionError(f"it ended without saying {word!r}")

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        data = None if body is None else json.dumps(body).encode()
        return fetch(urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers}))

    def until_ready(self) -> list[int]:
        """Waits; returns the statuses of /readyz on the way."""
        statuses, end_s = [self.ask("/readyz").status], time.monotonic() + 60
        while statuses[-1] != 200:
            assert time.monotonic() < end_s
            time.sleep(0.05)
            statuses.append(self.ask("/readyz").status)
        return statuses


@contextlib.contextmanager
def ended(running: Process) -> Iterator[Process]:
    """A service that is ended whatever happens."""
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(20)
        for stream in (running.process.stdout, running.process.stderr):
            stream.close()


def test_the_program_from_its_start_to_its_end(tmp_path: Path) -> None:
    """It listens at once, loads, answers with its key, drains on SIGTERM, and leaves with 0."""
    config = write_config(tmp_path, **ROOMY)
    words = ["serve", config, "--port", "0", "--max-rows", "2", "--memory.host", "1GiB"]
    with ended(Process([sys.executable, "-m", "zero", *words], ZERO_API_KEY=KEY)) as running:
        assert running.ask("/healthz").status == 200
        assert set(running.until_ready()[:-1]) <= {503}
        said = Process.line(running.process.stdout, "http://")
        assert re.match(r"tiny at http://127\.0\.0\.1:\d+ \(model .* on the device.*; 2 rows of 32 tokens\)$", said), (
            said
        )
        assert running.ask("/v1/models").status == 401
        key = {"Authorization": f"Bearer {KEY}"}
        assert running.ask("/v1/models", **key).json["data"][0]["id"] == "tiny"
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": "The", "max_tokens": 28, "n": 8}
            waiting = pool.submit(partial(running.ask, "/v1/completions", body, **key))
            end_s = time.monotonic() + 10
            while not running.ask("/status", **key).json["queue"]["num_rows"] and not waiting.done():
                assert time.monotonic() < end_s
            running.process.send_signal(signal.SIGTERM)
            assert len(waiting.result(30).json["choices"]) == 8, "what runs is finished"
        assert running.process.wait(30) == 0
        assert "Traceback" not in running.process.stderr.read()


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from zero.serving.run import serve
from zero.serving.settings import ServingSettings
from zero.report.logs import configure_logging

def loads_slowly():
    time.sleep(60)

def answers_slowly():
    from serving_case import FakeGenerator, FakeTokenizer
    from zero.serving import Loaded
    return Loaded(FakeGenerator(pass_s=0.5), FakeTokenizer())

def fails():
    from serving_case import FakeGenerator, FakeTokenizer
    from zero.serving import Loaded
    generator = FakeGenerator()
    generator.keeps_failing = RuntimeError("every pass fails")
    return Loaded(generator, FakeTokenizer())

configure_logging(rank=0)
serve({load}, ServingSettings("fake", port=0), print)
"""


class TestSignals:
    """On models that are not there: only signals and exit codes matter."""

    def program(self, load: str) -> Process:
        return Process([sys.executable, "-c", PROGRAM.format(tests=str(ROOT / "tests"), load=load)])

    def test_while_it_loads(self) -> None:
        with ended(self.program("loads_slowly")) as running:
            assert running.ask("/readyz").status == 503
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(15) == 0

    def test_a_second_one_ends_it_at_once(self) -> None:
        with ended(self.program("answers_slowly")) as running, ThreadPoolExecutor(1) as pool:
            running.until_ready()
            waiting = pool.submit(running.ask, "/v1/completions", {"prompt": "The", "max_tokens": 100})
            until(lambda: running.ask("/status").json["queue"]["num_rows"] > 0)
            running.process.send_signal(signal.SIGTERM)
            until(lambda: running.ask("/readyz").status == 503)
            assert running.process.poll() is None
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(15) == 128 + signal.SIGTERM
            assert waiting.exception(15) is not None
            assert "SIGTERM again: ended at once" in running.process.stderr.read()

    def test_a_service_that_cannot_go_on_ends_with_an_error(self) -> None:
        with ended(self.program("fails")) as running:
            running.until_ready()
            statuses = {running.ask("/v1/completions", {"prompt": "The"}).status for _ in range(3)}
            assert statuses <= {500, 503}
            assert running.process.wait(15) == 1
            assert "ServiceFailed: passes through the model failed" in running.process.stderr.read()


class TestRefusedBeforeItListens:
    @pytest.mark.parametrize(
        ("words", "fragment"),
        [
            (["--host", "0.0.0.0"], "set the environment variable ZERO_API_KEY"),
            (["--port", "70000"], "--port 70000"),
            (["--max-queue", "-1"], "--max-queue -1"),
            (["--max-rows", "0"], "--max-rows 0"),
            (["--deadline-s", "nan"], "--deadline-s nan"),
            (["--api-key", "two words"], "--api-key"),
            (["--train.max_steps", "5"], "zero serve does not read it"),
            (["--device.memry", "5GiB"], "device.memry"),
            (["--prot", "8000"], "did you mean --port?"),
        ],
    )
    def test_options(
        self, words: list[str], fragment: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("ZERO_API_KEY", raising=False)
        assert main(["serve", write_config(tmp_path), *words]) == 2
        said = capsys.readouterr().err
        assert fragment in said
        assert "Traceback" not in said

    def test_a_port_that_is_taken(self, tmp_path: Path, capsys: Output) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["serve", write_config(tmp_path), "--port", port]) == 2
        assert f"--port {port}: Address already in use; give another --port" in capsys.readouterr().err

    def test_a_model_that_is_not_there(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["serve", str(tmp_path / "nothing"), "--port", "0", "--device.type", "cpu"]) == 2
        assert "model.name_or_path" in capsys.readouterr().err

    def test_a_model_that_does_not_fit(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["serve", write_config(tmp_path), "--port", "0", "--device.memory", "20KiB"]) in (1, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_names_under_which_models_are_served(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert served_name("facebook/opt-125m") == "facebook/opt-125m"
    assert served_name("configs/quickstart.toml") == "quickstart"
    assert served_name("models/SmolLM2-135M.Q4_1.gguf") == "SmolLM2-135M.Q4_1"
    assert served_name(str(tmp_path / "run" / "model")) == "run"
    assert served_name(str(tmp_path / "run")) == "run"
