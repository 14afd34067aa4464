"""The arguments of every command, and what ``--help`` says about them."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from zero.cli import commands
from zero.cli.processes import add_process_options
from zero.cli.words import CommandParser, keys_aside, script_aside

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[CommandParser]

_FIRST_STEPS = """\
first steps:
  zero train configs/quickstart.toml                  no network, no GPU: about two minutes
  zero generate runs/quickstart/model --prompt "The"  what came of it
  zero serve runs/quickstart/model                    the same over HTTP, and as a page in a browser
  zero eval runs/quickstart/model --text README.md     how well it predicts a text
  zero plan configs/opt-6.7b.toml                     does it fit, and where does every byte go?
  zero train configs/opt-6.7b.toml --device.memory 6GiB --train.max_steps 100
  zero train configs/opt-6.7b.toml --nprocs 2          two processes, each with its own accelerator

Any key of a config can be given as --section.key value; `zero validate --keys` lists them all.
`zero COMMAND --help` tells more about a command.
Exit codes: 0 done, 1 the run failed, 2 something given is wrong (and nothing was written)."""

_KEYS = """\
Any key of the config can be given as --section.key value and goes before the file, for example
  --train.max_steps 100  --optimizer.lr 1e-5  --device.memory 6GiB  --memory.policy cpu  --train.output_dir runs/mine
`zero validate --keys` lists all keys with their meaning and default; `zero validate CONFIG` shows a config resolved."""

_PROCESSES = """\
several processes:
  --nprocs N                                           N of them on this machine, one per accelerator
  torchrun --nnodes 2 --nproc-per-node 4 ... -m zero   several machines: the same command behind it, without --nprocs
  srun zero                                            the same inside a SLURM job
The first process prints as one alone does; the others print warnings and errors, with their number before each line."""

_USAGE = {
    "train": " [--nprocs N] [--max-restarts K]",
    "plan": " [--on CARD] [--timeline PNG] [--trace JSON]",
    "validate": " [--keys]",
}

_DESCRIPTIONS = {
    "train": """\
Fine-tunes the model of [model] on the text of [data]. Everything that can be refused (config, data, a model that does
not fit) is refused before the run folder is made. Results go to train.output_dir, by default runs/ and the name of the
config: the resolved config, metrics, a picture of the memory, checkpoints, and a Hugging Face folder model/.""",
    "plan": """\
Walks one micro-batch through the model on tensors without memory, and says what the run will need on the device and on
the host. Needs no accelerator; say which machine is meant: --device.memory 24GiB --memory.host 120GiB.
--on rtx3090 plans for that card by its data sheet, --on this for what `zero probe` measures here, each with the predicted
step time, what limits it, what would help, and the same for the next smaller and larger card.
Exit code 0: it fits; 2: it does not, with the table of who needs what and the smallest change that would fit.""",
    "validate": """\
Checks a config and prints it with every default filled in. All problems are listed at once.""",
}


def make_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """All commands and their arguments, and the commands' names."""
    parser = CommandParser(
        prog="zero",
        description="Fine-tune causal language models bigger than the GPU, with the numerics of plain PyTorch.",
        epilog=_FIRST_STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=CommandParser
    )
    _add_config_verbs(verbs)
    _add_run(verbs)
    _add_generate(verbs)
    _add_eval(verbs)
    _add_serve(verbs)
    _add_export(verbs)
    _add_probe(verbs)
    env = verbs.add_parser("env", help="say what this machine and installation offer, for a bug report")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=commands.env)
    return parser, list(verbs.choices)


def _add_config_verbs(verbs: Verbs) -> None:
    for name, function, text in (
        ("train", commands.train, "fine-tune what a config describes"),
        ("plan", commands.plan, "say whether it fits and where every byte goes, without loading the model"),
        ("validate", commands.validate, "check a config and show it resolved"),
    ):
        verb = verbs.add_parser(
            name,
            help=text,
            usage=f"zero {name} CONFIG{_USAGE[name]} [--section.key value ...]",
            description=_DESCRIPTIONS[name],
            epilog=f"{_PROCESSES}\n\n{_KEYS}" if name == "train" else _KEYS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            splitter=keys_aside,
        )
        verb.add_argument("config", nargs="?", metavar="CONFIG", help="a .toml, .yaml, .json or .py file")
        if name == "train":
            add_process_options(verb)
        if name == "plan":
            verb.add_argument("--on", metavar="CARD", help="a card by name, such as rtx3090 or h100, or this")
            verb.add_argument("--timeline", type=Path, metavar="PNG", help="draw the predicted schedule of one step")
            verb.add_argument("--trace", type=Path, metavar="JSON", help="write it for https://ui.perfetto.dev")
        if name == "validate":
            verb.add_argument("--keys", action="store_true", help="list every key with its meaning and default")
        verb.set_defaults(run=function)


def _add_probe(verbs: Verbs) -> None:
    probe = verbs.add_parser(
        "probe",
        help="measure this machine: link, memory, update rates, matrix products",
        usage="zero probe [--nprocs N] [--json] [--again] [--device.key value ...] [--memory.disk FOLDER]",
        description="""\
Measures in about a second what plans are made from: the link both ways, alone and together, host memory, AdamW on host
and device, matrix products; with --memory.disk the disk of that folder as well. What was found is kept for this device,
processor, number of threads and torch. With --nprocs N all processes measure at the same time, as they will run, and the
slowest counts.""",
        splitter=keys_aside,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    probe.add_argument("--json", action="store_true", help="as JSON, in bytes, elements and operations per second")
    probe.add_argument("--again", action="store_true", help="measure even what is known")
    add_process_options(probe)
    probe.set_defaults(run=commands.probe)


def _add_run(verbs: Verbs) -> None:
    run = verbs.add_parser(
        "run",
        help="run your own training script with a config",
        usage="zero run SCRIPT [--nprocs N] [--max-restarts K] [--config CONFIG] [arguments of the script ...]",
        description="""\
Runs a Python file whose zero.launch() and zero.initialize() read CONFIG where they are given no config of their own. With
--nprocs N the file runs as N processes; after zero.launch() it can use torch.distributed. From the first word on that is
none of the options below, everything is the script's: --nprocs and --config stand before it.""",
        epilog=_PROCESSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        splitter=script_aside,
    )
    run.add_argument("script", metavar="SCRIPT", help="a Python file that calls zero.initialize()")
    run.add_argument("--config", metavar="CONFIG", help="what launch() and initialize() read by themselves")
    add_process_options(run)
    run.set_defaults(run=commands.run_script)


def _add_generate(verbs: Verbs) -> None:
    generate = verbs.add_parser(
        "generate",
        help="continue a prompt with a trained model, under a memory cap",
        description="""\
Continues a prompt, or each prompt of a file (--prompts). A model larger than the device is fetched in chunks
(--device.memory 2GiB), once for all prompts that run together.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        splitter=keys_aside,
    )
    generate.add_argument("model", metavar="MODEL", help="a Hugging Face folder or name, or a .gguf file")
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue (default: The)")
    generate.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one prompt per line; .jsonl: {"prompt": ..., and settings}'
    )
    generate.add_argument("--out", type=Path, metavar="FILE", help="with --prompts: where JSON lines go (stdout)")
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens to add (64, or what the model reads)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest tokens; 0: all (0)"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from this share of probability (1)"
    )
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="P", help="above 1: what was said is less likely (1)"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    generate.add_argument("-n", type=int, default=1, metavar="N", help="answers to each prompt (1)")
    generate.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities of each token and of the K likeliest"
    )
    generate.set_defaults(run=commands.generate)


def _add_serve(verbs: Verbs) -> None:
    serve = verbs.add_parser(
        "serve",
        help="serve a model over HTTP: OpenAI's API and a page",
        usage="zero serve MODEL [--host H] [--port N] [--section.key value ...]",
        description="""\
Serves a model, which may be larger than the device (--device.memory 2GiB), at /v1/completions, /v1/chat/completions,
/generation and, for people, at /. Listens at once; /readyz says 200 when the model is loaded. SIGTERM lets running
requests finish; a second one does not. See docs/serving.md.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        splitter=keys_aside,
    )
    serve.add_argument("model", metavar="MODEL", help="a config file, a Hugging Face folder or name, or a .gguf file")
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (8000)")
    serve.add_argument(
        "--api-key", metavar="KEY", help="that clients must give; better in ZERO_API_KEY; needed unless on loopback"
    )
    serve.add_argument("--max-queue", type=int, default=64, metavar="N", help="completions that may wait (64)")
    serve.add_argument("--max-rows", type=int, metavar="N", help="completions that run at a time (32)")
    serve.add_argument("--deadline-s", type=float, default=600.0, metavar="S", help="most seconds per request (600)")
    serve.set_defaults(run=commands.serve)


def _add_eval(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "eval",
        help="perplexity of text, lm-eval's tasks, answers in conversations",
        usage="zero eval CONFIG|MODEL [--text FILE ...] [--tasks NAMES] [--dialogue FILE] [--nprocs N]\n"
        "                 [--section.key value ...]",
        description="""\
Evaluates a model, which may be larger than the device (--device.memory 2GiB). MODEL is a Hugging Face folder or name,
or a .gguf file; a CONFIG stands for its [model], or for what its run has made where that starts at random, and its
data.eval is the text where nothing else is asked for. With --nprocs N each process does its share of the texts. Numbers
published for OPT models are shown beside those of a model of such a size.""",
        epilog=_PROCESSES,
        splitter=keys_aside,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "model", metavar="CONFIG|MODEL", help="a config file, a Hugging Face folder or name, or a .gguf file"
    )
    verb.add_argument("--text", nargs="+", metavar="FILE", help="files with plain text, each scored by itself")
    verb.add_argument("--window", type=int, metavar="N", help="most tokens read at once (all that the model reads)")
    verb.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next (the window)")
    verb.add_argument(
        "--words", dest="per_word", action="store_true", help="perplexity per word as well, as WikiText counts them"
    )
    verb.add_argument("--tasks", nargs="+", metavar="NAME", help="of lm-eval or the OPT paper; opt-paper: all its 16")
    verb.add_argument("--shots", type=int, metavar="K", help="examples in each prompt (what each task has)")
    verb.add_argument("--limit", type=int, metavar="N", help="most documents of each task (all)")
    verb.add_argument("--task-path", metavar="DIR", help="folder with lm-eval tasks of your own")
    verb.add_argument("--dialogue", metavar="FILE", help='conversations: lines of {"turns": ["Hi!", "Hello!"]}')
    verb.add_argument("--dialogue-tokenizer", metavar="NAME", help="normalise to its tokens (the paper: gpt2)")
    verb.add_argument("--batch-size", type=int, metavar="N", help="sequences at a time (16384 tokens, or what fits)")
    verb.add_argument("--out", metavar="FILE", help="write the results as JSON")
    add_process_options(verb)
    verb.set_defaults(run=commands.evaluate)


def _add_export(verbs: Verbs) -> None:
    export = verbs.add_parser("export", help="make a Hugging Face folder of a checkpoint, without a GPU")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-* folder, or a folder that holds them")
    export.add_argument("folder", metavar="DIR", help="where to write; must not exist or be empty")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default: as trained")
    export.set_defaults(run=commands.export)


def _version() -> str:
    try:
        return f"gemini-zero {version('gemini-zero')}"
    except PackageNotFoundError:
        return "gemini-zero, not installed (running from its source folder)"
