"""One system that generates from a model larger than its device, measured in a process of its own."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gemini.dryrun import fake_conversions, fake_mode
from gemini.plan import ChunkFacts, DoesNotFitError
from gemini.simulated import SimulatedDevice
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.dryrun import Generation, InferenceNeeds, InferenceWalk
from zero.models.sizes import opt_size
from zero.setup import DTYPES

CONTEXT_BYTES = 1 << 30
"""Of a card's memory, what is not the allocator's to give: CUDA's context and libraries."""
CARD = "rtx3090"
"""Whose virtual time the simulated device reckons."""
HOST_BESIDE_DISK = "1B"
"""Of the model, what the host may hold where the disk is to be used."""
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_BLOCK_NUMEL = 1_000_003
PAD = 1


def opt_config(shape: str) -> Any:
    """The published shape, or a tiny one; no token ends a text, so all are as long as was asked."""
    from transformers import OPTConfig

    changes = {"eos_token_id": None, "dropout": 0.0}
    return OPTConfig(**TINY, **changes) if shape == "tiny" else opt_size(shape).config(**changes)


def make_model(shape: str, dtype: str) -> Any:
    """Random weights from one block of numbers: drawing billions would take minutes.

    Its length is prime, and each parameter goes on where the one before it ended, so that no two rows are alike: greedy
    choices would be ties, or always the same.
    """
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(opt_config(shape))
    model = model.to(DTYPES[dtype]).to_empty(device="cpu")
    block = (torch.randn(_BLOCK_NUMEL, generator=torch.Generator().manual_seed(0)) * 0.02).to(DTYPES[dtype])
    block, at = torch.cat([block, block]), 0
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            continue
        for piece in parameter.data.view(-1).split(_BLOCK_NUMEL):
            piece.copy_(block[at : at + piece.numel()])
            at = (at + piece.numel()) % _BLOCK_NUMEL
    model.tie_weights()
    return model.eval().requires_grad_(False)


def walk_through(shape: str, dtype: str, wishes: list[Generation]) -> tuple[list[ChunkFacts], list[InferenceNeeds]]:
    """What passes of these kinds need, found on fake tensors: the model's chunks, and one answer per wish."""
    from transformers import OPTForCausalLM

    with fake_mode():
        with fake_conversions():
            model = OPTForCausalLM(opt_config(shape)).to(DTYPES[dtype]).eval().requires_grad_(False)
            model.tie_weights()  # each of a tied pair was converted by itself
        walk = InferenceWalk(model, load_config({"precision": {"dtype": dtype}}))
        return walk._engine.facts, [walk.walk(asked) for asked in wishes]


def generation_of(batch: int, prompt: int, new: int) -> Generation:
    """All rows begin together and end together."""
    return Generation(batch, prompt + new, ((batch, prompt),))


def non_model_bytes(found: InferenceNeeds) -> int:
    """Activations at the highest, beside all keys and values."""
    return max(moment.non_model_peak_bytes for moment in found.trace.moments) + found.cache_bytes


# -- the device ----------------------------------------------------------------------------------------------------------


def allocator_bytes(job: dict[str, Any]) -> int:
    """What may be taken of the device's memory in all."""
    capacity_bytes: int = job["capacity_bytes"]
    return capacity_bytes - (CONTEXT_BYTES if job["device"] == "cuda" else 0)


def device_table(job: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {"type": job["device"], "memory": f"{allocator_bytes(job)}B"}
    # What only finds mistakes takes time that no real device would need.
    return table | {"poison": False, "profile": CARD} if job["device"] == "simulated" else table


def _config_of(job: dict[str, Any], folder: str) -> Config:
    memory = {"disk": folder, "host": HOST_BESIDE_DISK} if job["tier"] == "disk" else {}
    return load_config({"device": device_table(job), "memory": memory, "precision": {"dtype": job["dtype"]}})


# -- this project --------------------------------------------------------------------------------------------------------


class _Numbers:
    """A tokenizer for those who have tokens already."""

    eos_token_id = None
    pad_token_id = PAD

    def decode(self, tokens: list[int], **options: Any) -> str:
        del options
        return " ".join(map(str, tokens))


class Ours:
    """This project's generator, with room for exactly what will be generated.

    Args:
        job: of :func:`measure`.
        batch: rows at a time.
        folder: of the disk tier.
    """

    def __init__(self, job: dict[str, Any], batch: int, folder: str) -> None:
        from zero.generation import Generator, Limits
        from zero.generation.cache import rounded
        from zero.generation.facts import facts_of
        from zero.inference import make_inference_engine

        model = make_model(job["shape"], job["dtype"])
        positions = batch * rounded(job["prompt"] + job["new"])
        position_bytes = facts_of(model, _Numbers()).position_bytes
        tensor_bytes = -(-position_bytes // (2 * model.config.num_hidden_layers))
        cache_bytes = positions * (position_bytes + tensor_bytes)  # and a tensor that is being made anew
        expected = generation_of(batch, job["prompt"], job["new"])
        self.engine, self.outlook = make_inference_engine(
            model, _config_of(job, folder), expected=expected, cache_bytes=cache_bytes
        )
        self.device = self.engine.device
        limits = Limits(batch, job["prompt"] + job["new"], batch * job["prompt"] + batch, cache_bytes)
        self._generator = Generator(self.engine, _Numbers(), limits)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """New tokens of each prompt."""
        from zero.generation import Sampling

        jobs = [self._generator.submit(prompt, Sampling(max_new_tokens=new)) for prompt in prompts]
        self._generator.run()
        return [job.result()[0].tokens for job in jobs]

    def timed(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The same, but that the simulated device follows model data only: following every tensor takes time of its own."""
        if not isinstance(self.device, SimulatedDevice):
            return self.generate(prompts, new)
        with mock.patch.object(self.device, "activity", contextlib.nullcontext):
            return self.generate(prompts, new)

    @property
    def link_bytes(self) -> int:
        """That came to the device so far."""
        return self._generator.statistics.streamed_bytes

    def told(self) -> dict[str, Any]:
        """Bytes, and what was predicted."""
        return {
            "device_peak_bytes": self.engine.device.lifetime_peaks().device_bytes,
            "resident_bytes": self.outlook.device_bytes,
            "predicted_tokens_per_s": self.outlook.tokens_per_s,
        }

    def close(self) -> None:
        """Gives everything back."""
        self._generator.close()
        self.engine.close(keep_values=False)


# -- one run -------------------------------------------------------------------------------------------------------------


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each of the job's batches, the smallest first; those that do not fit say so in ``error``.

    Args:
        job: system, shape, dtype, device, tier, capacity_bytes, prompt, new, batches, repeats.
    """
    from transformers.utils import logging as others

    others.set_verbosity_error()
    others.disable_progress_bar()
    if job["device"] == "cuda" and job["system"] != "ours":  # ours caps itself
        share = allocator_bytes(job) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    wishes = [generation_of(batch, job["prompt"], job["new"]) for batch in job["batches"]]
    needs = [] if job["system"] == "ours" else walk_through(job["shape"], job["dtype"], wishes)[1]
    rows = []
    for number, batch in enumerate(job["batches"]):
        try:
            row = _measure_ours(job, batch) if job["system"] == "ours" else _measure_peer(job, batch, needs[number])
        except (torch.OutOfMemoryError, MemoryError) as error:
            row = {"error": f"does not fit: {error}"}
        rows.append({"batch": batch} | row)
    return rows


def _measure_ours(job: dict[str, Any], batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        try:
            system = Ours(job, batch, folder)
        except DoesNotFitError as error:
            raise torch.OutOfMemoryError(str(error)) from error
        return _timed(system, job, batch)


def _measure_peer(job: dict[str, Any], batch: int, found: InferenceNeeds) -> dict[str, Any]:
    """With the largest share of the device that it runs with, give or take a part in thirty-two."""
    from generation_accelerate import Accelerate

    capacity_bytes = allocator_bytes(job)
    for spared_bytes in range(0, capacity_bytes, capacity_bytes // 32):
        with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
            try:
                system = Accelerate(job, batch, folder, found, spared_bytes)
                return _timed(system, job, batch)
            except torch.OutOfMemoryError as error:
                said = str(error)
        if job["device"] == "cuda":
            torch.cuda.empty_cache()
        if non_model_bytes(found) + spared_bytes >= capacity_bytes:
            break  # nothing of the model was there
    raise torch.OutOfMemoryError(said)


def _virtual_s(system: Any) -> float:
    """How late it is on the card that the simulated device stands for; 0 on a real one."""
    return system.device.virtual_time_s if isinstance(system.device, SimulatedDevice) else 0.0


def _host_peak_bytes() -> int:
    """Highest resident bytes of this process so far, what its parent had not counted."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM: peaks are measured on Linux only")


def _timed(system: Any, job: dict[str, Any], batch: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    vocabulary = opt_config(job["shape"]).vocab_size
    prompts = torch.randint(4, vocabulary, (batch, job["prompt"]), generator=draw).tolist()
    try:
        before_s = _virtual_s(system)
        tokens = system.generate(prompts, job["new"])  # shows that it fits, and warms up
        virtual_s = _virtual_s(system) - before_s
        seconds, cpu_seconds, before_bytes = [], [], system.link_bytes
        for _ in range(job["repeats"]):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            system.timed(prompts, job["new"])
            seconds.append(time.perf_counter() - began_s)
            cpu_seconds.append(time.process_time() - began_cpu_s)
        link_bytes = (system.link_bytes - before_bytes) / job["repeats"]
        told = system.told()
    finally:
        system.close()
    return {
        "tokens_per_s": batch * job["new"] / statistics.median(seconds),
        "cpu_s_per_pass": statistics.median(cpu_seconds) / job["new"],
        "virtual_tokens_per_s": batch * job["new"] / virtual_s if virtual_s else None,
        "link_bytes_per_pass": link_bytes / job["new"],
        "link_bytes_per_token": link_bytes / (batch * job["new"]),
        "host_peak_bytes": _host_peak_bytes(),
        **told,
        "tokens": tokens,
    }
