"""The command line: ``zero train CONFIG``, and the rest of the verbs.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from zero.cli import commands
from zero.cli.parser import make_parser
from zero.config.words import nearest
from zero.errors import UserError
from zero.report.logs import configure_logging

logger = logging.getLogger("zero")

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point of ``zero``.

    Args:
        argv: words after the program's name; by default this process's.

    Returns:
        The exit code.
    """
    if sys.stdout is None:  # closed by whoever started us: what is said goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    # Before torch is loaded: threads that wait for one another by spinning take the core that the other would run on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_logging()
    try:
        arguments, rest = _parse(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse's way to end: after --help, or with a usage line on stderr
        return int(stop.code or 0)
    run: Callable[[argparse.Namespace, list[str]], int] = arguments.run
    try:
        return run(arguments, rest)
    except ValueError as error:
        if not _is_the_users(error):
            raise
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_WRONG_INPUT
    except commands.RunFailed as error:
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_FAILED
    except MemoryError as error:
        if not _is_of_the_host(error):
            raise
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("zero: interrupted\n")
        return EXIT_INTERRUPTED


def _is_of_the_host(error: MemoryError) -> bool:
    arena = sys.modules.get("gemini.arena")
    return arena is not None and isinstance(error, arena.HostMemoryError)


def _is_the_users(error: ValueError) -> bool:
    # Not imported here: that would bring torch, and `zero validate` shall answer at once. What was never imported was
    # never raised.
    plan = sys.modules.get("gemini.plan")
    return isinstance(error, UserError) or (plan is not None and isinstance(error, plan.DoesNotFitError))


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's arguments and what is left over; raises SystemExit as argparse does."""
    parser, verbs = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_WRONG_INPUT)
    if not words[0].startswith("-") and words[0] not in verbs:
        meant = nearest(words[0], verbs)
        hint = f"did you mean {meant}?" if meant else f"commands: {', '.join(verbs)}"
        sys.stderr.write(f"zero: {words[0]}: no such command; {hint}\n")
        raise SystemExit(EXIT_WRONG_INPUT)
    return parser.parse_known_args(words)


if __name__ == "__main__":
    sys.exit(main())
