"""Writes the parts of the documentation that are made from the code: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from zero.config.describe import config_reference

CONFIG_REFERENCE = Path(__file__).resolve().parent / "config.md"

_HEAD = """\
# The config, key by key

Made by `make docs` from the schema in `zero/config/`; do not edit. `zero validate --keys` prints it on a terminal.

A config is a TOML file (YAML, JSON and Python are read too). Any key can be given on the command line as
`--section.key value`, which goes before the file; the file goes before the defaults. Unknown keys are errors. Amounts
of memory are texts with a unit, such as `"6GiB"`. `zero validate CONFIG` prints a config with all defaults filled in.

"""


def reference_text() -> str:
    """The whole of ``docs/config.md``."""
    return _HEAD + config_reference()


if __name__ == "__main__":
    CONFIG_REFERENCE.write_text(reference_text(), encoding="utf-8")
