"""Generation for many at a time: the same tokens alone and in company, on any device; nothing leaks, nothing is left."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
import transformers

import zero
from tests.generation_case import (
    HOST,
    KINDS,
    SMALL,
    Bytes,
    Letters,
    Scripted,
    generating,
    model_of,
    prompts,
    settings,
    tokens_of,
)
from zero.errors import UserError
from zero.generation import Generator, Limits, Piece, Sampling


def alone(model: Any, prompt: list[int], num_new: int) -> list[int]:
    """What transformers' own generation gives."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, pad_token_id=1)
    return list(out[0, len(prompt) :].tolist())


class TestGreedy:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("device", [HOST, SMALL], ids=["host", "small"])
    def test_as_transformers_generates(self, kind: str, device: dict[str, Any]) -> None:
        model = model_of(kind)
        requests = [(prompt, 1 + place % 13) for place, prompt in enumerate(prompts(12))]
        wanted = [alone(model, prompt, num_new) for prompt, num_new in requests]
        with generating(model, device, max_rows=8, max_cache_bytes=256 << 10) as generator:
            jobs = [generator.submit(prompt, Sampling(max_new_tokens=num)) for prompt, num in requests]
            generator.run()
            assert [tokens_of(job) for job in jobs] == wanted
            statistics = generator.statistics
            assert statistics.padding_fraction <= 0.125
            assert statistics.cache_peak_bytes <= 256 << 10
            assert statistics.num_new_tokens == sum(map(len, wanted))
            assert statistics.num_prompt_tokens == sum(len(prompt) for prompt, _ in requests)

    def test_two_hundred_in_any_order_on_any_device(self) -> None:
        model = model_of("opt-pre-norm")
        requests = [(prompt, 1 + place % 5) for place, prompt in enumerate(prompts(200, seed=5, longest=30))]
        wanted = [alone(model, prompt, num_new) for prompt, num_new in requests]
        cases = [
            (HOST, {"max_rows": 32, "max_cache_bytes": 1 << 30}),
            (HOST, {"max_rows": 5, "max_batch_tokens": 32, "max_cache_bytes": 200 << 10}),
            (SMALL, {"max_rows": 24, "max_cache_bytes": 1 << 20}),
        ]
        for number, (device, limits) in enumerate(cases):
            order = random.Random(number).sample(range(200), 200)
            got: dict[int, list[int]] = {}
            with generating(model, device, **limits) as generator:
                jobs = {}
                for place in order:
                    jobs[place] = generator.submit(requests[place][0], Sampling(max_new_tokens=requests[place][1]))
                    if place % 3 == 0:
                        generator.run_pass()
                generator.run()
                got = {place: tokens_of(job) for place, job in jobs.items()}
                assert generator.statistics.padding_fraction <= 0.125
                assert generator.statistics.cache_peak_bytes <= limits["max_cache_bytes"]
            assert [got[place] for place in range(200)] == wanted, (device, limits)

    def test_weights_cross_the_link_once_for_all_buckets(self) -> None:
        streamed = {}
        for num in (1, 4):
            with generating(model_of("llama"), {"type": "simulated", "memory": "1MiB"}) as generator:
                for length in (2, 10, 25, 50)[:num]:
                    generator.submit([5] * length, Sampling(max_new_tokens=2))
                generator.run_pass()
                assert generator.statistics.num_forwards == num
                streamed[num] = generator.statistics.streamed_bytes
        assert streamed[4] == streamed[1] > 0


class TestSettings:
    @pytest.mark.parametrize("kind", ["opt-pre-norm", "llama"])
    def test_each_gets_what_it_gets_alone(self, kind: str) -> None:
        model = model_of(kind)
        requests = list(zip(prompts(24, seed=2, longest=12), settings(24), strict=True))
        with generating(model, max_rows=1) as generator:
            single = []
            for prompt, sampling in requests:
                job = generator.submit(prompt, sampling)
                generator.run()
                single.append(job.result(0)[0])
        with generating(model, max_rows=16) as generator:
            jobs = [generator.submit(prompt, sampling) for prompt, sampling in requests]
            generator.run()
            for job, expected, (_, sampling) in zip(jobs, single, requests, strict=True):
                got = job.result(0)[0]
                assert (got.tokens, got.text, got.finish_reason) == (
                    expected.tokens, expected.text, expected.finish_reason,
                ), sampling  # fmt: skip
                assert len(got.logprobs) == (0 if sampling.logprobs is None else len(got.tokens))
                for mine, theirs in zip(got.logprobs, expected.logprobs, strict=True):
                    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
                    assert len(mine.top) == sampling.logprobs

    def test_n_and_seed(self) -> None:
        with generating(model_of("gpt2")) as generator:
            several = generator.submit("hello", Sampling(temperature=2.0, seed=7, max_new_tokens=12), n=3)
            singles = [
                generator.submit("hello", Sampling(temperature=2.0, seed=7 + i, max_new_tokens=12)) for i in range(3)
            ]
            fresh = [generator.submit("hello", Sampling(temperature=2.0, max_new_tokens=12)) for _ in range(2)]
            generator.run()
            choices = [choice.tokens for choice in several.result(0)]
            assert choices == [tokens_of(job) for job in singles]
            assert len({tuple(tokens) for tokens in choices}) == 3
            assert tokens_of(fresh[0]) != tokens_of(fresh[1])

    def test_logprobs_are_the_models(self) -> None:
        model = model_of("llama")
        prompt = prompts(1, seed=3)[0]
        with generating(model) as generator:
            job = generator.submit(prompt, Sampling(temperature=1.0, top_k=3, seed=0, logprobs=4, max_new_tokens=5))
            generator.run()
            choice = job.result(0)[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + choice.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for place, (token, said) in enumerate(zip(choice.tokens, choice.logprobs, strict=True)):
            assert said.token == token
            assert said.logprob == pytest.approx(float(expected[place, token]), abs=1e-5)
            best = expected[place].topk(4)
            assert [number for number, _, _ in said.top] == best.indices.tolist()
            assert [value for _, _, value in said.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def saying(text: bytes) -> Scripted:
    """A model that answers a prompt of one token with these bytes, and then ends."""
    script = [byte + 4 for byte in text] + [2]
    return Scripted(lambda tokens: script[len(tokens) - 1])


class TestText:
    def test_never_half_a_character(self) -> None:
        text = "aé漢🙂 zürich"
        with generating(saying(text.encode()), tokenizer=Bytes()) as generator:
            pieces: list[Piece] = []
            job = generator.submit([70], Sampling(max_new_tokens=100), on_piece=pieces.append)
            generator.run()
            assert job.result(0)[0].text == text
            assert job.result(0)[0].finish_reason == "stop"
            assert all("\ufffd" not in piece.text for piece in pieces)
            assert [piece.text for piece in pieces if piece.text] == list(text)
            assert len(pieces) == len(text.encode()) + 1

    def test_half_a_character_at_the_end_is_not_shown(self) -> None:
        with generating(saying("ab漢".encode()), tokenizer=Bytes()) as generator:
            job = generator.submit([70], Sampling(max_new_tokens=4))
            generator.run()
            assert (job.result(0)[0].text, job.result(0)[0].finish_reason) == ("ab", "length")

    @pytest.mark.parametrize(
        ("stop", "expected", "reason"),
        [
            (("lo w",), "hel", "stop"),
            (("world!", "wor"), "hello ", "stop"),
            (("o",), "hell", "stop"),
            (("worlds",), "hello world", "stop"),  # which the model's own end tells
            (("ello world", "lo"), "hel", "stop"),  # the one that is complete first
            (("x", "rld"), "hello wo", "stop"),
        ],
    )
    def test_stop_strings_over_token_borders(self, stop: tuple[str, ...], expected: str, reason: str) -> None:
        with generating(saying(b"hello world"), tokenizer=Bytes()) as generator:
            shown: list[str] = []
            job = generator.submit([70], Sampling(stop=stop), on_piece=lambda piece: shown.append(piece.text))
            generator.run()
            assert (job.result(0)[0].text, job.result(0)[0].finish_reason) == (expected, reason)
            assert "".join(shown) == expected

    def test_a_text_that_may_begin_a_stop_string_waits(self) -> None:
        with generating(saying(b"abcabd"), tokenizer=Bytes()) as generator:
            shown: list[str] = []
            generator.submit([70], Sampling(stop=("abd",)), on_piece=lambda piece: shown.append(piece.text))
            generator.run()
            assert shown == ["", "", "abc", "", "", ""]


class TestRequests:
    def test_cancelling_frees_rows_and_cache(self) -> None:
        with generating(model_of("opt-pre-norm"), max_rows=4) as generator:
            jobs = [generator.submit("hello", Sampling(max_new_tokens=40)) for _ in range(6)]
            generator.run_pass()
            assert generator.statistics.num_rows == 4
            assert generator.statistics.num_waiting == 2
            held_bytes = generator.statistics.cache_bytes
            for job in (jobs[0], jobs[1], jobs[2], jobs[5]):
                generator.cancel(job)
            generator.run_pass()
            assert generator.statistics.num_rows == 2
            assert generator.statistics.cache_bytes < held_bytes
            assert jobs[0].result(0)[0].finish_reason == "cancelled"
            assert len(tokens_of(jobs[0])) == 1
            assert tokens_of(jobs[5]) == []
            generator.run()
            assert len(tokens_of(jobs[3])) == len(tokens_of(jobs[4])) == 40
            generator.cancel(jobs[3])  # too late: nothing
            assert not generator.run_pass()

    def test_requests_come_from_many_threads(self) -> None:
        model = model_of("llama")
        wanted = [alone(model, prompt, 6) for prompt in prompts(24, seed=6)]
        got: dict[int, list[int]] = {}
        with generating(model, max_rows=8) as generator:
            ended = threading.Event()

            def ask(first: int) -> None:
                for place in range(first, 24, 4):
                    job = generator.submit(prompts(24, seed=6)[place], Sampling(max_new_tokens=6))
                    got[place] = job.result(60)[0].tokens
                    generator.cancel(generator.submit("unwanted", Sampling(max_new_tokens=20)))

            def work() -> None:
                while generator.run_pass() or not ended.is_set():
                    time.sleep(0)

            worker = threading.Thread(target=work)
            askers = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
            for thread in (worker, *askers):
                thread.start()
            for thread in askers:
                thread.join()
            ended.set()
            worker.join()
        assert [got[place] for place in range(24)] == wanted

    def test_an_interrupted_pass_can_be_run_again(self) -> None:
        model = model_of("opt-pre-norm")
        requests = [[5] * 3, [6] * 30]
        wanted = [alone(model, prompt, 6) for prompt in requests]
        with generating(model, SMALL) as generator:
            jobs = [generator.submit(prompt, Sampling(max_new_tokens=6)) for prompt in requests]
            for at in (1, 4):
                calls = 0

                def interrupt(*_: Any, at: int = at) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == at:
                        raise KeyboardInterrupt

                handle = model.model.decoder.layers[1].fc1.register_forward_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    generator.run()
                handle.remove()
            generator.run()
            assert [tokens_of(job) for job in jobs] == wanted

    def test_a_function_that_raises_ends_its_request_alone(self) -> None:
        def refuse(piece: Piece) -> None:
            raise ConnectionError("gone")

        with generating(model_of("gpt2")) as generator:
            bad = generator.submit("one", Sampling(max_new_tokens=5), n=2, on_piece=refuse)
            good = generator.submit("two", Sampling(max_new_tokens=5))
            generator.run()
            with pytest.raises(ConnectionError):
                bad.result(0)
            assert len(tokens_of(good)) == 5

    @pytest.mark.parametrize(
        ("prompt", "fragment"),
        [
            ("", "no tokens"),
            ([], "no tokens"),
            ([5] * 64, "64 tokens, and the model reads at most 64"),
            ([5] * 60, "allowed is at most 4"),
            ([96], "token 96"),
            ([-1], "token -1"),
            ([1.5], "whole numbers"),
            (7, "int was given"),
            ("caf\udce9", "not UTF-8 at character 4"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything(self, prompt: Any, fragment: str) -> None:
        with generating(model_of("opt-pre-norm")) as generator:
            with pytest.raises(UserError, match=fragment):
                generator.submit(prompt, Sampling(max_new_tokens=8))
            assert not generator.run_pass()

    def test_no_room_at_all_is_refused(self) -> None:
        with generating(model_of("opt-pre-norm"), max_cache_bytes=70 << 10) as generator:
            generator.submit("abc", Sampling(max_new_tokens=61))
            generator.run()
        with (
            generating(model_of("opt-pre-norm"), max_cache_bytes=50 << 10) as generator,
            pytest.raises(UserError, match="limits.max_cache_bytes"),
        ):
            generator.submit("abc", Sampling(max_new_tokens=61))

    def test_a_long_request_does_not_starve(self) -> None:
        """Short ones keep coming, and whenever one ends another would fit in its place."""
        with generating(Scripted(lambda tokens: 50), tokenizer=Bytes(), max_cache_bytes=24 << 10) as generator:
            for _ in range(9):
                generator.submit([40], Sampling(max_new_tokens=20))
                generator.run_pass()
            assert (generator.statistics.num_rows, generator.statistics.num_waiting) == (8, 1), "the cache is full"
            long = generator.submit([40] * 180, Sampling(max_new_tokens=20))
            num_passes = 0
            while not long.done.is_set():
                generator.submit([40], Sampling(max_new_tokens=20))
                generator.run_pass()
                num_passes += 1
                assert num_passes < 150, "others are let past without end"

    def test_models_that_keep_no_keys_and_values(self) -> None:
        engine, *_ = zero.initialize(torch.nn.Linear(2, 2), config={"device": HOST})
        with pytest.raises(UserError, match="Linear cannot generate here"):
            Generator(engine, Letters())

    def test_limits(self) -> None:
        with pytest.raises(UserError, match="max_rows = 0"):
            Limits(max_rows=0)
        engine, *_ = zero.initialize(model_of("llama"), config={"device": HOST})
        with pytest.raises(UserError, match="the model reads at most 64"):
            Generator(engine, Letters(), Limits(max_tokens=65))
        assert Generator(engine, Letters()).limits.max_tokens == 64


class TestMemory:
    @pytest.mark.parametrize("kind", ["opt-pre-norm", "gpt2", "llama"])
    @pytest.mark.parametrize("device", [HOST, SMALL], ids=["host", "small"])
    def test_a_cache_on_the_host_changes_nothing(self, kind: str, device: dict[str, Any]) -> None:
        said = {}
        for on_host in (False, True):
            with generating(
                model_of(kind), device, cache_on_host=on_host, max_rows=6, max_cache_bytes=256 << 10
            ) as generator:
                jobs = [generator.submit(p, Sampling(max_new_tokens=9, logprobs=2)) for p in prompts(7, seed=9)]
                generator.run()
                said[on_host] = [
                    [(one.token, one.logprob, one.top) for one in job.result(0)[0].logprobs] for job in jobs
                ]
        assert said[True] == said[False], "bit for bit"

    def test_the_host_holds_what_the_device_cannot(self) -> None:
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=96, hidden_size=32, num_hidden_layers=10, ffn_dim=32, num_attention_heads=4,
                max_position_embeddings=64, eos_token_id=2,
            )
        ).eval()  # fmt: skip
        limits = {"cache_on_host": True, "max_cache_bytes": 4 << 20, "max_batch_tokens": 64}
        with generating(model, SMALL | {"memory": "700KiB"}, **limits) as generator:
            jobs = [generator.submit([9] * 20, Sampling(max_new_tokens=8)) for _ in range(8)]
            generator.run()
            assert generator.statistics.cache_peak_bytes > 900 << 10
            assert len({tuple(tokens_of(job)) for job in jobs}) == 1

    def test_memory_that_runs_out_means_fewer_rows(self) -> None:
        """The cache may take more than the device has: passes fail, rows wait again, and all get their tokens."""
        model = model_of("opt-pre-norm")
        wanted = [alone(model, prompt, 12) for prompt in prompts(12, seed=4)]
        small = {"type": "simulated", "memory": "250KiB"}
        with generating(model, small, max_cache_bytes=4 << 20) as generator:
            jobs = [generator.submit(prompt, Sampling(max_new_tokens=12)) for prompt in prompts(12, seed=4)]
            generator.run()
            assert [tokens_of(job) for job in jobs] == wanted

    def test_a_failing_forward_fails_its_own_rows(self) -> None:
        def say(tokens: list[int]) -> int:
            if tokens[0] == 99 and len(tokens) == 3:
                raise RuntimeError("a kernel failed")
            return 50

        with generating(Scripted(say), tokenizer=Bytes()) as generator:
            bad = generator.submit([99] * 2, Sampling(max_new_tokens=5))
            good = generator.submit([40] * 100, Sampling(max_new_tokens=5))
            generator.run()
            with pytest.raises(RuntimeError, match="a kernel failed"):
                bad.result(0)
            assert tokens_of(good) == [50] * 5
            again = generator.submit([40] * 2, Sampling(max_new_tokens=2))
            generator.run()
            assert tokens_of(again) == [50] * 2

    def test_training_goes_on_after_it(self) -> None:
        model = model_of("gpt2").train()
        engine, *_ = zero.initialize(
            model, torch.optim.AdamW(model.parameters()), config={"device": SMALL | {"memory": "2MiB"}}
        )
        generator = Generator(engine, Letters(), Limits(max_cache_bytes=256 << 10))
        batch = {"input_ids": torch.full((2, 8), 7), "labels": torch.full((2, 8), 7)}
        tokens = []
        for _ in range(3):
            engine.zero_grad()
            engine.backward(engine(**batch).loss)
            engine.step()
            jobs = [generator.submit(prompt, Sampling(max_new_tokens=4)) for prompt in ("a", "hello there")]
            generator.run()
            assert model.training
            tokens.append([tokens_of(job) for job in jobs])
        assert tokens[-1][0] == [7] * 4, "what was trained counts"
        engine.check_integrity()
        engine.close()
