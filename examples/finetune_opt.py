"""Fine-tunes an OPT in a loop of your own: launch, ZeroInitContext, initialize, and then the loop you know.

    python examples/finetune_opt.py                                      tiny OPT, text from Python itself, no network
    python examples/finetune_opt.py --model facebook/opt-1.3b --device-memory 6GiB --dtype bf16 --steps 100
    python examples/finetune_opt.py --model runs/quickstart/model --text my.txt

Without an accelerator the device is simulated, with --device-memory as its capacity.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, get_linear_schedule_with_warmup

import zero
from zero.data.sample import builtin_documents
from zero.data.tokenizer import builtin_tokenizer

TINY = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}


def main() -> None:
    """Trains for a number of steps and saves a Hugging Face folder."""
    arguments = parse_arguments()
    zero.launch(
        config={
            "device": {"type": "auto", "memory": arguments.device_memory},
            "precision": {"dtype": arguments.dtype},
            "train": {"max_grad_norm": 1.0},
        }
    )
    torch.manual_seed(0)
    model, tokenizer = build_model(arguments.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    lr_scheduler = get_linear_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    train_dataloader = build_dataloader(tokenizer, arguments)

    engine, train_dataloader, _, lr_scheduler = zero.initialize(
        model=model, optimizer=optimizer, train_dataloader=train_dataloader, lr_scheduler=lr_scheduler
    )

    step = 0
    while step < arguments.steps:
        for batch in train_dataloader:
            engine.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            lr_scheduler.step()
            step += 1
            print(f"step {step}/{arguments.steps}  loss {loss.item():.4f}  grad_norm {engine.grad_norm:.3f}")
            if step == arguments.steps:
                break

    print_report(engine.memory_report())
    engine.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    engine.close()
    print(f"saved to {arguments.output}: AutoModelForCausalLM.from_pretrained loads it, without this project")


def build_model(name: str | None) -> tuple[Any, Any]:
    """The model of a folder or the Hub, streamed from its files into chunks; or a tiny one with random weights."""
    with zero.ZeroInitContext():
        if name is None:
            return OPTForCausalLM(OPTConfig(**TINY)), builtin_tokenizer(TINY["vocab_size"])
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def build_dataloader(tokenizer: Any, arguments: argparse.Namespace) -> DataLoader[Any]:
    """Rows of a fixed number of tokens, cut from one long text."""
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else "\n".join(builtin_documents())
    ids = torch.tensor(tokenizer(text, return_token_type_ids=False)["input_ids"])
    rows = ids[: len(ids) // arguments.seq_length * arguments.seq_length].view(-1, arguments.seq_length)
    if len(rows) < arguments.batch_size:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for one batch; take a longer --text")
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    return DataLoader(samples, batch_size=arguments.batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type]


def print_report(report: Any) -> None:
    """What the run used."""
    for name in ("device_capacity_bytes", "device_peak_bytes", "predicted_device_peak_bytes", "host_bytes"):
        print(f"{name:<28} {getattr(report, name) / 2**20:8.1f} MiB")
    print(f"in the last step: {report.num_fetches} fetches, {report.num_evictions} evictions,", end=" ")
    print(f"{report.h2d_bytes / 2**20:.1f} MiB to the device, {report.d2h_bytes / 2**20:.1f} MiB back")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder or name; default: a tiny OPT with random weights")
    parser.add_argument("--text", help="a text file to train on; default: prose that comes with Python")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device-memory", default="8MiB", help='what the device may hold, such as "6GiB" (8MiB)')
    parser.add_argument("--output", default="runs/finetune_opt", help="where the trained model goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
