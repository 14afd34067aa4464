"""The service under load and in trouble: overload, clients that leave, deadlines, failures, the way out."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from serving_case import KEY, FakeGenerator, FakeTokenizer, Running, says, serving, until

from zero.generation import Limits, Sampling
from zero.serving import Loaded


def slow(pass_s: float = 0.01, max_rows: int = 2) -> FakeGenerator:
    """A model whose answers take a while."""
    return FakeGenerator(Limits(max_rows=max_rows, max_tokens=256), pass_s)


def begun(running: Running, **body: Any) -> http.client.HTTPConnection:
    """A request of which nobody has read the reply yet."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    data = json.dumps({"prompt": "hello", "max_tokens": 200, **body})
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    return connection


class TestOverload:
    def test_ten_times_too_many(self) -> None:
        """Those let in are answered, the others are told when to come again, and memory stays bounded."""
        with serving(slow(0.002, 4), max_queue=8) as running, ThreadPoolExecutor(60) as pool:
            running.complete(max_tokens=2)
            before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks: list[int] = []

            def ask(number: int) -> Any:
                reply = running.complete(max_tokens=20, seed=number, prompt="x" * 200)
                peaks.append(running.service.num_open_choices)
                return reply

            replies = list(pool.map(ask, range(120)))
            answered = [reply for reply in replies if reply.status == 200]
            refused = [reply for reply in replies if reply.status == 429]
            assert len(answered) + len(refused) == 120
            assert len(answered) >= 12
            assert refused
            for reply in refused:
                assert 1 <= int(reply.headers["Retry-After"]) <= 60
                assert (reply.error["type"], reply.error["code"]) == ("rate_limit_error", "queue_full")
            assert max(peaks) <= 12
            assert running.generator.most_rows <= 4
            assert running.is_free()
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10
            assert f"zero_refused_total {len(refused)}" in running.get("/metrics").text
            assert running.complete(max_tokens=2).status == 200

    def test_choices_count_and_not_requests(self) -> None:
        with serving(slow(), max_queue=1) as running:
            first = begun(running, n=2)
            until(lambda: running.service.num_open_choices == 2)
            assert running.complete(n=2, max_tokens=1).status == 429, "one place is free, and two are needed"
            reply = running.complete(n=4)
            assert (reply.status, reply.error["code"]) == (400, "too_many_choices"), "never possible is not: later"
            first.close()
            assert running.is_free()

    def test_settings_do_not_leak_between_requests(self) -> None:
        with serving(FakeGenerator(Limits(max_rows=8, max_tokens=256))) as running, ThreadPoolExecutor(16) as pool:

            def ask(number: int) -> None:
                settings = {
                    "temperature": 1 + number / 100,
                    "top_k": number,
                    "seed": 1000 * number,
                    "n": 1 + number % 3,
                }
                reply = running.complete(max_tokens=20 + number % 30, **settings)
                for index, choice in enumerate(reply.json["choices"]):
                    sampling = Sampling(temperature=1 + number / 100, top_k=number, seed=1000 * number)
                    assert choice["text"] == says(sampling, index)[: 20 + number % 30]

            list(pool.map(ask, range(64)))
            assert running.is_free()


class TestClientsThatLeave:
    @pytest.mark.parametrize("streams", [True, False], ids=["streaming", "whole"])
    def test_one_frees_its_row(self, streams: bool) -> None:
        with serving(slow(0.02)) as running:
            connection = begun(running, stream=streams)
            until(lambda: running.generator.statistics.num_rows == 1)
            if streams:
                assert connection.getresponse().read(20)
            assert connection.sock is not None or streams
            connection.close()
            assert running.is_free(2.0), "long before the 200 tokens are there"
            assert running.generator.statistics.num_new_tokens < 150
            assert 'outcome="left"} 1' in running.get("/metrics").text

    def test_a_storm_of_them_leaves_no_rows(self) -> None:
        with serving(slow(0.005, 4), max_queue=40) as running:
            for round_ in range(5):
                connections = [begun(running, stream=bool(number % 2), n=1 + number % 2) for number in range(24)]
                time.sleep(0.01 * round_)
                for connection in connections:
                    connection.close()
            assert running.is_free()
            assert running.complete(max_tokens=3).status == 200

    def test_one_that_does_not_read_its_stream_is_given_up(self) -> None:
        """Long before its deadline, and before all that it has asked for is made."""
        num_asked = 1 << 19
        generator = FakeGenerator(Limits(max_rows=2, max_tokens=2 * num_asked), 0.0001)
        generator.text = "x" * num_asked
        with serving(generator, max_buffered_pieces=100, deadline_s=60.0) as running:
            host, port = running.url.removeprefix("http://").split(":")
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((host, int(port)))
                body = json.dumps({"prompt": "a", "max_tokens": num_asked, "stream": True}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: running.generator.statistics.num_rows == 1)
                assert running.is_free(15.0)
                assert running.generator.statistics.num_new_tokens < num_asked
                until(lambda: 'status="200"} 1' in running.get("/metrics").text)  # and its place at the gate


class TestDeadline:
    def test_a_whole_answer(self) -> None:
        with serving(slow(0.05), deadline_s=0.2) as running:
            reply = running.complete(max_tokens=200)
            assert (reply.status, reply.error["code"]) == (504, "deadline")
            assert running.is_free()

    def test_a_stream_ends_with_an_error(self) -> None:
        with serving(slow(0.05), deadline_s=0.3) as running:
            reply = running.complete(max_tokens=200, stream=True)
            events = [json.loads(part[6:]) for part in reply.text.split("\n\n") if part.startswith("data: ")]
            assert "choices" in events[0]
            assert events[-1]["error"]["code"] == "deadline"
            assert "[DONE]" not in reply.text
            assert running.is_free()

    def test_a_silent_stream_is_kept_open(self) -> None:
        with serving(slow(0.3), keep_alive_s=0.05) as running:
            assert ": still here\n\n" in running.complete(max_tokens=2, stream=True).text


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "status", "code"),
        [(RuntimeError("SECRET"), 500, "pass_failed"), (torch.OutOfMemoryError("SECRET"), 503, "out_of_memory")],
        ids=["a fault", "no memory"],
    )
    def test_a_pass_that_fails(self, failure: Exception, status: int, code: str) -> None:
        with serving() as running:
            running.generator.failure = failure
            reply = running.complete()
            assert (reply.status, reply.error["code"]) == (status, code)
            assert "SECRET" not in reply.text
            assert running.is_free()
            running.generator.failure = failure
            assert json.loads(running.complete(stream=True).text.split("data: ")[-1])["error"]["code"] == code
            assert running.complete(max_tokens=3).status == 200
            assert "zero_failed_passes_total 2" in running.get("/metrics").text

    def test_a_thread_that_dies_turns_readiness_off(self) -> None:
        with serving(slow(0.05)) as running, ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(running.complete, max_tokens=200) for _ in range(4)]
            until(lambda: running.generator.statistics.num_rows == 2)
            running.generator.failure = SystemExit("a thread ended by whatever")
            assert {future.result().status for future in waiting} == {503}
            until(lambda: running.get("/readyz").status == 503)
            assert running.get("/readyz").json == {"status": "failed"}
            assert running.complete().error["code"] == "failed"
            assert running.get("/healthz").status == 200
            assert running.service.num_calls == running.service.num_open_choices == 0

    def test_passes_that_keep_failing_end_the_thread(self) -> None:
        with serving() as running:
            running.generator.keeps_failing = RuntimeError("for good")
            statuses = [running.complete().status for _ in range(3)]
            assert statuses[0] == 500
            until(lambda: running.get("/readyz").status == 503)
            assert isinstance(running.service.worker.failure, RuntimeError)

    def test_prompts_are_not_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("DEBUG")
        with serving(deadline_s=5) as running:
            running.complete(prompt="SECRET words", user="SECRET")
            running.complete(prompt="SECRET words", wrong="SECRET")
            running.generator.failure = RuntimeError("a pass")
            running.complete(prompt="SECRET words")
            running.generator.encode = _fails  # a fault nobody thought of, whose words quote the prompt
            reply = running.complete(prompt="SECRET words")
            assert (reply.status, reply.error["code"]) == (500, "internal")
        assert "SECRET" not in caplog.text
        assert "KeyError, while answering a request" in caplog.text


def _fails(prompt: Any) -> list[int]:
    raise KeyError(prompt)


class TestStates:
    def test_while_loading(self) -> None:
        gate = threading.Event()
        generator = FakeGenerator()

        def load() -> Loaded:
            gate.wait(10)
            return Loaded(generator, FakeTokenizer())

        with serving(generator, load=load, is_ready=False) as running:
            assert running.get("/healthz").status == 200
            assert (running.get("/readyz").status, running.get("/readyz").json) == (503, {"status": "loading"})
            reply = running.complete()
            assert (reply.status, reply.error["code"]) == (503, "loading")
            assert int(reply.headers["Retry-After"]) >= 1
            assert running.get("/status").json == {"model": "fake", "state": "loading"}
            assert running.get("/metrics").status == running.get("/").status == 200
            gate.set()
            until(lambda: running.get("/readyz").status == 200)
            assert running.complete().status == 200

    def test_draining_answers_what_runs_and_refuses_what_comes(self) -> None:
        with serving(slow(0.01)) as running, ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(running.complete, max_tokens=40) for _ in range(5)]
            until(lambda: (seen := running.generator.statistics).num_rows + seen.num_waiting == 5)
            done = drain(running, 10)
            until(lambda: running.get("/readyz").status == 503)
            assert (running.complete().status, running.complete().error["code"]) == (503, "draining")
            assert [future.result().status for future in waiting] == [200] * 5
            done.result(5)
            assert running.is_free()

    def test_what_takes_too_long_is_ended(self) -> None:
        with serving(slow(0.05)) as running, ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(running.complete, max_tokens=200)
            until(lambda: running.generator.statistics.num_rows == 1)
            drain(running, 0.1).result(5)
            assert (waiting.result().status, waiting.result().error["code"]) == (503, "draining")
            assert running.is_free()


def drain(running: Running, timeout_s: float) -> Future[None]:
    """Begins to drain, as SIGTERM does."""
    done: Future[None] = Future()

    async def work() -> None:
        await running.service.drain(timeout_s)
        done.set_result(None)

    asyncio.run_coroutine_threadsafe(work(), running.loop)
    return done


class ChatTokenizer(FakeTokenizer):
    """Of a model with a chat template."""

    chat_template = "a template"


class TestOpenAIClient:
    def test_it_works(self) -> None:
        with (
            serving(tokenizer=ChatTokenizer(), api_key=KEY) as running,
            openai.OpenAI(base_url=running.url + "/v1", api_key=KEY, max_retries=0) as client,
        ):
            assert [model.id for model in client.models.list()] == ["fake"]
            whole = client.completions.create(model="fake", prompt="hello", max_tokens=8, temperature=0.5, logprobs=1)
            assert whole.choices[0].text == "<0.5|0|1"
            assert whole.choices[0].finish_reason == "length"
            assert whole.usage is not None
            assert whole.usage.total_tokens == 13
            stream = client.completions.create(
                model="fake", prompt="hello", max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "<1.0|0|1"
            assert chunks[-1].usage is not None
            messages: list[Any] = [{"role": "user", "content": "hi"}]
            chat = client.chat.completions.create(
                model="fake", messages=messages, max_tokens=4, extra_body={"top_k": 3, "repetition_penalty": 1.5}
            )
            assert chat.choices[0].message.content == "<1.0"
            deltas = client.chat.completions.create(model="fake", messages=messages, max_tokens=4, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == "<1.0"

    def test_its_errors_are_of_the_right_kinds(self) -> None:
        with serving(slow(0.05), api_key=KEY, deadline_s=0.3) as running:
            client = openai.OpenAI(base_url=running.url + "/v1", api_key=KEY, max_retries=0)
            with pytest.raises(openai.BadRequestError, match="reads at most 256"):
                client.completions.create(model="fake", prompt="hello", max_tokens=1000)
            with pytest.raises(openai.NotFoundError, match="this service has one model: fake"):
                client.completions.create(model="other", prompt="hello")
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}])
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").models.list()
            with pytest.raises(openai.APIError, match=r"no answer within 0\.3 s"):
                list(client.completions.create(model="fake", prompt="hello", max_tokens=200, stream=True))
            client.close()
