"""Which words of a command line are whose: the command's own options, keys of the config, or a script's arguments.

argparse alone would take the value in ``--train.max_steps 3 config.toml`` for the config file: it knows nothing of keys
that are not declared. So those words are put aside before it looks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zero.config.words import nearest


class Split(NamedTuple):
    """The words of a command."""

    own: list[str]
    """For argparse."""
    aside: list[str]
    """For the config or the script, in their order."""


Splitter = Callable[[Sequence[str], frozenset[str]], Split]


def keys_aside(words: Sequence[str], own_options: frozenset[str]) -> Split:
    """Puts aside every ``--word`` that is none of the command's own options, with the value that follows it.

    Args:
        words: what was given after the command.
        own_options: such as ``--nprocs``.
    """
    split = Split([], [])
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or name in own_options:
            split.own.append(word)
            continue
        split.aside.append(word)
        if not equals and position < len(words) and not words[position].startswith("--"):
            split.aside.append(words[position])
            position += 1
    return split


def script_aside(words: Sequence[str], own_options: frozenset[str]) -> Split:
    """Puts aside what belongs to a script: everything after it, but for our own options directly behind it.

    A ``--`` ends our own options: ``zero run loop.py -- --config mine.json``.
    """
    position, has_script = 0, False
    while position < len(words):
        name, equals, _ = words[position].partition("=")
        if words[position] == "--":
            return Split(list(words[:position]), list(words[position + 1 :]))
        if name in own_options and not (has_script and name in ("-h", "--help")):
            position += 1 if equals or name in ("-h", "--help") else 2
        elif has_script:
            break
        else:
            has_script = not name.startswith("-")
            position += 1
    return Split(list(words[:position]), list(words[position:]))


class CommandParser(argparse.ArgumentParser):
    """The parser of one command; its ``parse_known_args`` returns what is not its own as the rest.

    Args:
        splitter: decides which words argparse gets to see; by default all.
        options: argparse's.
    """

    def __init__(self, *arguments: Any, splitter: Splitter | None = None, **options: Any) -> None:
        self._own_options: set[str] = set()
        self._splitter = splitter
        options["allow_abbrev"] = False  # a near miss is refused with a suggestion instead
        super().__init__(*arguments, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's, and remembers the names of options."""
        self._own_options.update(name for name in names if name.startswith("-"))
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, over the words that are this command's own."""
        words = list(args or ())
        if self._splitter is None:
            return super().parse_known_args(words, namespace)
        split = self._splitter(words, frozenset(self._own_options))
        if self._splitter is keys_aside:
            self._refuse_near_misses(split.aside)
        namespace, rest = super().parse_known_args(split.own, namespace)
        return namespace, [*rest, *split.aside]

    def _refuse_near_misses(self, aside: list[str]) -> None:
        """A misspelt option of our own is no key of the config: those have a dot."""
        for word in aside:
            name = word.partition("=")[0]
            meant = nearest(name, self._own_options, cutoff=0.7) if name.startswith("--") and "." not in name else None
            if meant is not None:
                self.error(f"{name}: no such option; did you mean {meant}?")
