"""The command line: ``zero train CONFIG``, and the rest of the verbs.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from gemini.plan import DoesNotFitError
from zero.cli import commands
from zero.errors import UserError
from zero.report.logs import configure_logging

logger = logging.getLogger("zero")

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point of ``zero``."""
    configure_logging()
    parser = make_parser()
    arguments, rest = parser.parse_known_args(_one_dash(sys.argv[1:] if argv is None else argv))
    run: Callable[[argparse.Namespace, list[str]], int] = arguments.run
    try:
        return run(arguments, rest)
    except (UserError, DoesNotFitError) as error:
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_WRONG_INPUT
    except commands.RunFailed as error:
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("zero: interrupted\n")
        return EXIT_INTERRUPTED


def _one_dash(argv: Sequence[str]) -> list[str]:
    """``-nprocs N`` is accepted for ``--nprocs N``: it is what the README of the system re-created here promised."""
    return ["--nprocs" if word == "-nprocs" else word for word in argv]


def make_parser() -> argparse.ArgumentParser:
    """All commands and their arguments; ``--section.key value`` pairs are left to the config's own parser."""
    parser = argparse.ArgumentParser(
        prog="zero",
        description="Fine-tune causal language models bigger than the GPU, with the numerics of plain PyTorch.",
        epilog="Any key of the config can be given as --section.key value. `zero COMMAND --help` tells more.",
    )
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_config_verbs(verbs)
    run = verbs.add_parser("run", help="run your own training script with a config")
    run.add_argument("script", help="a Python file that calls zero.initialize()")
    run.add_argument("--config", help="what zero.launch() and zero.initialize() read by default")
    run.add_argument("--nprocs", type=int, default=1, help="processes (this version: 1)")
    run.set_defaults(run=commands.run_script)
    env = verbs.add_parser("env", help="what this machine offers")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=commands.env)
    export = verbs.add_parser("export", help="make a Hugging Face folder of a checkpoint, without a GPU")
    export.add_argument("checkpoint", help="a step-* folder, or a folder that holds them")
    export.add_argument("folder", help="where to write; must not exist or be empty")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the weights; default: as trained")
    export.set_defaults(run=commands.export)
    _add_generate(verbs)
    return parser


def _add_config_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, function, text in (
        ("train", commands.train, "fine-tune what a config describes"),
        ("plan", commands.plan, "say whether it fits and where every byte goes, without loading the model"),
        ("validate", commands.validate, "check a config and show it resolved"),
    ):
        verb = verbs.add_parser(name, help=text, epilog="Keys of the config: zero validate --keys")
        verb.add_argument("config", nargs="?", help="a .toml, .yaml, .json or .py file")
        if name == "train":
            verb.add_argument("--nprocs", type=int, default=1, help="processes (this version: 1)")
        if name == "validate":
            verb.add_argument("--keys", action="store_true", help="list every key with its meaning and default")
        verb.set_defaults(run=function)


def _add_generate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = verbs.add_parser("generate", help="continue a prompt with a trained model, under a memory cap")
    generate.add_argument("model", help="a Hugging Face folder or name, such as runs/quickstart/model")
    generate.add_argument("--prompt", default="The", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    generate.add_argument("--top-k", type=int, default=0, help="0: all")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=commands.generate)


if __name__ == "__main__":
    sys.exit(main())
