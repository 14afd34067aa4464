"""A plain PyTorch loop, with one call added: the model may now be larger than the device.

    python examples/own_loop_unchanged.py             with zero.initialize, on a device of 10 MiB (model data: 29 MiB)
    python examples/own_loop_unchanged.py --plain     without that call

Both print the same losses, to the last digit.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import zero


def main() -> None:
    """Trains a small GPT-2 on random tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="leave zero.initialize() out")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.steps)

    if not arguments.plain:
        engine, *_ = zero.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "device": {"type": "simulated", "memory": "10MiB"},
                "memory": {"chunk": "1MiB"},
                # torch's own arithmetic; the native kernel is faster and agrees to 1e-6
                "optimizer": {"kernel": "torch"},
            },
        )
        model, optimizer = engine.module, engine.optimizer

    for step in range(arguments.steps):
        tokens = torch.randint(0, 512, (2, 32))
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        print(f"step {step + 1}  loss {loss.item()!r}  grad_norm {float(norm)!r}")

    if not arguments.plain:
        report = engine.memory_report()
        print(f"# device: {report.device_peak_bytes:,} bytes at the highest of {report.device_capacity_bytes:,}")


if __name__ == "__main__":
    main()
