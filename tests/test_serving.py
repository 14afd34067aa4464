"""The endpoints of `zero serve`: what every reply looks like, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from serving_case import KEY, FakeGenerator, FakeTokenizer, Running, says, serving

from zero.errors import UserError
from zero.generation import Limits, Sampling
from zero.serving import ServingSettings


class ChatTokenizer(FakeTokenizer):
    chat_template = "a template"


@pytest.fixture(scope="module")
def base() -> Iterator[Running]:
    """A model without chat template."""
    with serving() as running:
        yield running
        assert running.is_free()


@pytest.fixture(scope="module")
def chat() -> Iterator[Running]:
    """A model with one."""
    with serving(tokenizer=ChatTokenizer()) as running:
        yield running
        assert running.is_free()


class TestCompletions:
    def test_a_whole_reply(self, base: Running) -> None:
        reply = base.complete(max_tokens=5, model="fake", user="somebody")
        assert reply.status == 200
        [choice] = reply.json["choices"]
        expected = says(Sampling(temperature=1.0), 0)[:5]
        assert choice == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
        assert reply.json["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        assert reply.json["object"] == "text_completion"
        assert reply.json["model"] == "fake"
        assert reply.json["id"].startswith("cmpl-")
        assert isinstance(reply.json["created"], int)

    def test_defaults_are_those_of_openai(self, base: Running) -> None:
        [choice] = base.complete().json["choices"]
        assert choice["text"] == says(Sampling(temperature=1.0), 0)[:16]

    @pytest.mark.parametrize(
        ("prompt", "num_prompts", "num_tokens"),
        [("ab", 1, 2), (["ab", "cde"], 2, 5), ([104, 105, 106], 1, 3), ([[104], [105, 106]], 2, 3)],
        ids=["text", "texts", "tokens", "lists of tokens"],
    )
    def test_prompts_of_every_kind(self, base: Running, prompt: Any, num_prompts: int, num_tokens: int) -> None:
        reply = base.complete(prompt=prompt, max_tokens=2, n=2, seed=3)
        assert [choice["index"] for choice in reply.json["choices"]] == list(range(2 * num_prompts))
        assert reply.json["usage"]["prompt_tokens"] == num_tokens
        assert reply.json["usage"]["completion_tokens"] == 4 * num_prompts

    def test_a_stream_says_the_same(self, base: Running) -> None:
        settings = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 30, "seed": 5, "temperature": 0.5}
        whole = base.complete(**settings).json
        events = base.stream(**settings, stream_options={"include_usage": True})
        last = events.pop()
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        texts, reasons = [""] * 4, [None] * 4
        for event in events:
            assert event["usage"] is None
            assert event["id"] == last["id"]
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
        assert len(events) >= 4 * 2, "pieces come one by one"

    def test_usage_in_a_stream_only_where_it_was_asked_for(self, base: Running) -> None:
        assert all("usage" not in event and event["choices"] for event in base.stream(max_tokens=2))

    def test_a_stop_string_ends_the_text(self, base: Running) -> None:
        [choice] = base.complete(max_tokens=30, stop="|").json["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == "<1.0"
        [choice] = base.complete(max_tokens=30, stop=["#", ">"]).json["choices"]
        assert choice["text"].endswith("None")

    def test_echo(self, base: Running) -> None:
        plain = base.complete(max_tokens=3).json["choices"][0]["text"]
        assert base.complete(max_tokens=3, echo=True).json["choices"][0]["text"] == "hello" + plain
        assert base.complete(prompt=[104, 105], max_tokens=3, echo=True).json["choices"][0]["text"] == "hi" + plain
        streamed = "".join(event["choices"][0]["text"] for event in base.stream(max_tokens=3, echo=True))
        assert streamed == "hello" + plain

    def test_logprobs(self, base: Running) -> None:
        [choice] = base.complete(max_tokens=3, logprobs=2).json["choices"]
        assert choice["logprobs"] == {
            "tokens": list(choice["text"]),
            "token_logprobs": [-0.5, -9999.0, -9999.0],
            "top_logprobs": [{"a": -1.0, "b": -2.0}] * 3,
            "text_offset": [0, 1, 2],
        }
        streamed = [event["choices"][0]["logprobs"] for event in base.stream(max_tokens=3, logprobs=0)]
        assert [part["text_offset"] for part in streamed] == [[0], [1], [2]]
        assert all(part["top_logprobs"] is None for part in streamed)

    def test_settings_reach_the_model(self, base: Running) -> None:
        settings = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 9}
        [_, second] = base.complete(max_tokens=40, n=2, **settings).json["choices"]
        assert second["text"].startswith("<0.25|7|0.5|1.5|10>")

    def test_what_narrows_a_draw_is_let_be_where_nothing_is_drawn(self, base: Running) -> None:
        [choice] = base.complete(max_tokens=20, temperature=0, top_p=0.3, top_k=4).json["choices"]
        assert choice["text"].startswith("<0.0|0|1.0|" if "0.0" in choice["text"] else "<0|0|1.0|")


class TestChat:
    def test_a_whole_reply(self, chat: Running) -> None:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "n": 2, "logprobs": True}
        reply = chat.post("/v1/chat/completions", {**body, "top_logprobs": 1})
        assert reply.status == 200
        assert reply.json["object"] == "chat.completion"
        first, second = reply.json["choices"]
        assert (first["index"], second["index"]) == (0, 1)
        text = says(Sampling(temperature=1.0), 0)[:4]
        assert first["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert first["logprobs"]["content"][0] == {
            "token": "<", "logprob": -0.5, "bytes": [60],
            "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
        }  # fmt: skip
        assert reply.json["usage"]["prompt_tokens"] == len("<user>hi<assistant>")

    def test_a_stream(self, chat: Running) -> None:
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        events = chat.stream("/v1/chat/completions", messages=messages, max_completion_tokens=3)
        assert events[0]["object"] == "chat.completion.chunk"
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "<1."
        assert events[-1]["choices"][0]["finish_reason"] == "length"

    def test_without_a_length_there_is_room(self, chat: Running) -> None:
        reply = chat.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]})
        prompt = len("<user><assistant>") + 100
        assert reply.json["usage"] == {
            "prompt_tokens": prompt, "completion_tokens": 256 - prompt, "total_tokens": 256
        }  # fmt: skip

    def test_a_template_that_refuses(self, chat: Running) -> None:
        reply = chat.post("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "hi"}]})
        assert reply.status == 400
        assert "chat template does not take these messages" in reply.error["message"]

    def test_no_template(self, base: Running) -> None:
        reply = base.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert (reply.status, reply.error["code"]) == (400, "no_chat_template")
        assert "/v1/completions" in reply.error["message"]


class TestOtherEndpoints:
    def test_generation_as_energonai_had_it(self, base: Running) -> None:
        body = {"prompt": "Hello", "max_tokens": 6, "top_k": 50, "top_p": 0.5, "temperature": 0.7}
        reply = base.post("/generation", body)
        assert reply.json == {"text": "Hello<0.7|5"}
        for wrong in ({"max_tokens": 257}, {"prompt": ""}, {"temperature": 0}, {"top_k": 0}, {"more": 1}):
            assert base.post("/generation", {**body, **wrong}).status == 400

    def test_models(self, base: Running) -> None:
        [model] = base.get("/v1/models").json["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "zero")
        assert model["created"] > 1_600_000_000

    def test_health(self, base: Running) -> None:
        assert base.get("/healthz").json == {"status": "ok"}
        assert base.get("/readyz").json == {"status": "ready"}

    def test_status(self, base: Running) -> None:
        status = base.get("/status").json
        assert status["queue"] == {"num_waiting": 0, "num_rows": 0, "max_rows": 4, "max_queue": 64}
        assert status["memory"]["device_capacity_bytes"] == 1 << 30
        assert (status["state"], status["model"], status["has_chat_template"]) == ("ready", "fake", False)

    def test_metrics(self, base: Running) -> None:
        base.complete(max_tokens=3)
        base.complete(max_tokens=0)
        reply = base.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        values = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#"))
        assert float(values['zero_requests_total{endpoint="/v1/completions",status="200"}']) >= 1
        assert float(values['zero_requests_total{endpoint="/v1/completions",status="400"}']) >= 1
        assert float(values['zero_answers_total{outcome="answered"}']) >= 1
        assert float(values["zero_new_tokens_total"]) >= 3
        assert values["zero_rows_limit"] == "4"
        assert values["zero_device_capacity_bytes"] == str(1 << 30)
        assert values['zero_answer_seconds_bucket{le="+Inf"}'] == values["zero_answer_seconds_count"]
        assert values['zero_state{state="ready"}'] == "1"
        for name in ("zero_waiting", "zero_batch_fill_ratio", "zero_padding_ratio", "zero_streamed_bytes_total"):
            assert name in values
        assert "zero_first_token_seconds_sum" in values

    def test_openapi_describes_the_bodies(self, base: Running) -> None:
        paths = base.get("/openapi.json").json["paths"]
        schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"prompt", "max_tokens", "stop", "stream_options"} <= set(schema["properties"])
        assert "$ref" not in json.dumps(schema)

    def test_paths_and_methods_that_are_not_there(self, base: Running) -> None:
        assert base.get("/v1/nothing").status == 404
        assert base.get("/v1/nothing").error["message"] == "no such path"
        assert base.get("/v1/completions").status == 405
        assert base.get("/docs").status == 404, "FastAPI's page loads scripts from elsewhere"

    def test_no_other_origin_is_let_in(self, base: Running) -> None:
        reply = base.get("/v1/models", Origin="http://elsewhere.example")
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"max_token": 5}, "max_token", "unknown key"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": 1e-9}, "", "temperature = 1e-09: must be 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 252}, "max_tokens", "reads at most 256 in all, so max_tokens may be at most 251"),
    ({"prompt": "x" * 300}, "prompt", "the prompt has 300 tokens"),
    ({"prompt": [1] * 300}, "prompt", "the prompt has 300 tokens"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": [[]]}, "prompt", "at least 1 item"),
    ({"prompt": [1, "a"]}, "prompt", "valid"),
    ({"prompt": [999]}, "", "token numbers go from 0 to 255"),
    ({"prompt": None}, "prompt", "valid"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": "x" * 129}, "stop", "at most 128 characters"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"logprobs": 1, "echo": True}, "", "echo with logprobs is not offered"),
    ({"best_of": 3}, "", "best_of is not offered"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty: not offered: leave it out or give 0"),
    ({"frequency_penalty": -1}, "frequency_penalty", "frequency_penalty: not offered: leave it out or give 0"),
    ({"stream_options": {"include_usage": True}}, "", "needs stream: true"),
    ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "unknown key"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 1 << 63}, "seed", "less than or equal to"),
]


class TestRefusals:
    @pytest.mark.parametrize(("body", "param", "fragment"), WRONG, ids=lambda value: str(value)[:30])
    def test_what_is_wrong_is_named(self, base: Running, body: dict[str, Any], param: str, fragment: str) -> None:
        reply = base.complete(**body)
        assert reply.status == 400
        assert fragment in reply.error["message"]
        assert (reply.error["param"] or "") == param
        assert reply.error["type"] == "invalid_request_error"

    def test_all_problems_at_once(self, base: Running) -> None:
        message = base.complete(n=0, top_p=2, temprature=1).error["message"]
        assert all(f"{key}: " in message for key in ("n", "top_p", "temprature"))

    def test_a_prompt_is_not_repeated_in_an_error(self, base: Running) -> None:
        assert "SECRET" not in base.complete(prompt=[{"SECRET": 1}], n=0).text

    def test_another_model(self, base: Running) -> None:
        reply = base.complete(model="gpt-4")
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")

    def test_a_body_that_is_too_large_is_not_read(self, base: Running) -> None:
        reply = base.complete(prompt="x" * (1 << 20))
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")

    def test_only_json(self, base: Running) -> None:
        body = b'{"prompt": "hi"}'
        assert base.post("/v1/completions", body, **{"Content-Type": "text/plain"}).status == 415
        assert base.post("/v1/completions", body, **{"Content-Type": "application/json; charset=utf-8"}).status == 200

    def test_limits_come_before_the_tokenizer(self) -> None:
        with serving(FakeGenerator(Limits(max_rows=1, max_tokens=16))) as running:
            for wrong in ({"n": 17}, {"prompt": [1] * 20}, {"stop": ["a"] * 9}, {"nothing": 1}):
                assert running.complete(**wrong).status == 400
            assert running.complete(prompt="x" * (1 << 20)).status == 413
            assert running.generator.num_encoded == 0


def malformed(chance: random.Random) -> bytes:
    """A body that is wrong in one of many ways."""
    good = {"prompt": "hello", "max_tokens": 2, "temperature": 1.0, "n": 1, "stop": ["a"], "stream": False}
    strange: list[Any] = [
        None, -1, 1e308, 1 << 70, "", "\ud800", [], {}, [[]], [None], {"a": 1}, True, "x" * 600, [1.5], [[1], "a"],
        [-1], [[1 << 40]], "\x00",
    ]  # fmt: skip
    kind = chance.randrange(5)
    if kind == 0:  # not a document at all
        return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 60)))
    if kind == 1:  # cut off
        whole = json.dumps(good).encode()
        return whole[: chance.randrange(len(whole))]
    if kind == 2:  # not an object, or one too deep
        return chance.choice(
            [b"[]", b"3", b'"x"', b"null", b"[" * 5000, b'{"prompt":' * 3000, b"NaN", b'{"n": NaN}', b""]
        )
    if kind == 3:  # an unknown key
        return json.dumps({**good, "".join(chance.choices("abcxyz_\n\"'<", k=9)): chance.choice(strange)}).encode()
    key = chance.choice(["max_tokens", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "prompt"])
    wrong = [-3, 1e400, "x" * 600 if key != "prompt" else "", [None], {"a": [1]}, [[[]]], 1 << 90, "\ud800" * 200]
    return json.dumps({**good, key: chance.choice(wrong)}).encode()


@pytest.mark.parametrize("path", ["/v1/completions", "/generation", "/v1/chat/completions"])
def test_malformed_bodies_are_refused_and_the_service_lives(base: Running, path: str) -> None:
    chance = random.Random(path)
    for number in range(500 if path == "/v1/completions" else 60):
        body = malformed(chance)
        reply = base.post(path, body)
        assert 400 <= reply.status < 500, (number, body[:200], reply.text[:300])
        assert reply.error["message"], (number, body[:200])
    assert base.complete(max_tokens=2).status == 200


class TestKey:
    def test_nothing_is_answered_without_it(self) -> None:
        with serving(api_key=KEY) as running:
            paths = ("/v1/models", "/metrics", "/status", "/openapi.json", "/v1/nothing")
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
                assert running.post("/v1/completions", {"prompt": "a"}, **given).status == 401
                assert running.post("/generation", {"prompt": "a"}, **given).error["code"] == "invalid_api_key"
                assert {running.get(path, **given).status for path in paths} == {401}
            assert running.get("/status").headers["www-authenticate"] == "Bearer"
            right = {"Authorization": f"Bearer {KEY}"}
            assert running.get("/status", **right).status == 200
            assert running.post("/v1/completions", {"prompt": "a"}, **right).status == 200
            assert [running.get(path).status for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]

    def test_it_is_needed_where_others_can_reach_the_service(self) -> None:
        for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
            with pytest.raises(UserError, match="a key is needed: set the environment variable ZERO_API_KEY"):
                ServingSettings("m", host=host)
            ServingSettings("m", host=host, api_key=KEY)
        for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1"):
            ServingSettings("m", host=host)

    def test_one_that_no_header_could_carry(self) -> None:
        for key in ("", "two words", "schlüssel", "line\nbreak"):
            with pytest.raises(UserError, match="--api-key"):
                ServingSettings("m", api_key=key)
        assert KEY not in repr(ServingSettings("m", api_key=KEY))

    def test_other_names_are_not_served_without_it(self, base: Running) -> None:
        """A page on the web may point its own name at 127.0.0.1."""
        assert base.get("/v1/models", Host="evil.example").status == 403
        assert base.get("/v1/models", Host="localhost:1").status == 200
        assert base.get("/v1/models", Host="[::1]:8000").status == 200
        with serving(api_key=KEY) as running:
            given = {"Host": "models.example", "Authorization": f"Bearer {KEY}"}
            assert running.get("/v1/models", **given).status == 200
