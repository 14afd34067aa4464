"""Generation with a model divided over ranks: all may generate, the same or not, and whoever has nothing to do serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zero
from tests.generation_case import Letters, model_of, prompts
from tests.ranks import run_ranks
from zero.generation import Generator, Limits, Sampling

DEVICES: dict[str, dict[str, Any]] = {"host": {"type": "cpu"}, "small": {"type": "simulated", "memory": "400KiB"}}


def _generate(device: str, nums: list[int]) -> list[list[int]]:
    """This rank's share of the prompts; then it waits for the others."""
    torch.set_num_threads(1)
    config = {"device": DEVICES[device], "parallel": {"replicate": "1KiB"}}
    engine, *_ = zero.initialize(model_of("opt-pre-norm"), config=config)
    generator = Generator(engine, Letters(), Limits(max_cache_bytes=256 << 10))
    mine = prompts(12, seed=3)[: nums[torch.distributed.get_rank()]]
    jobs = [generator.submit(prompt, Sampling(max_new_tokens=5)) for prompt in mine]
    generator.run()
    tokens = [job.result(0)[0].tokens for job in jobs]
    engine.meet("the end of generation")
    engine.check_integrity()
    engine.close(keep_values=False)
    return tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nums", [[12, 12], [12, 0], [4, 9]], ids=["the same", "one alone", "others"])
def test_ranks_generate_what_one_process_does(device: str, nums: list[int]) -> None:
    model = model_of("opt-pre-norm")
    wanted = []
    for prompt in prompts(12, seed=3):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=1)
        wanted.append(out[0, len(prompt) :].tolist())
    for rank, tokens in enumerate(run_ranks(_generate, 2, device, nums)):
        assert tokens == wanted[: nums[rank]]
