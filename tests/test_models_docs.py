"""What docs/models.md promises: its table is that of the code, its commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import metaseq_writer
import opt_models
import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from zero.models import convert, metaseq
from zero.models.sizes import OPT_SIZES, OPTSize

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_table_is_that_of_the_code() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| opt-")]
    assert rows == [
        [
            size.name, str(size.num_layers), str(size.num_heads), f"{size.hidden_size:,}", f"{size.parameter_numel:,}",
            f"{size.fp16_bytes / 1e9:.2f} GB", f"{size.kv_bytes_per_token:,} B", size.hub_name or "no",
        ]
        for size in OPT_SIZES.values()
    ]  # fmt: skip


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opt_models.opt_model().save_pretrained("models/opt-125m")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=61)).save_pretrained("models/gpt2")
    for name in ("opt-6.7b", "mine"):
        metaseq_writer.write(Path("metaseq") / name, opt_models.opt_model(vocab_size=62))
    monkeypatch.setitem(OPT_SIZES, "opt-6.7b", _Tiny("opt-6.7b", 3, 4, 24, 0, 2))
    lines = [shlex.split(line) for block in blocks("console") for line in block.splitlines()]
    mains = {"zero.models.convert": convert.main, "zero.models.metaseq": metaseq.main}
    assert len(lines) == 5
    for python, m, module, *words in lines:
        assert [python, m] == ["python", "-m"]
        assert mains[module](words) == 0
        assert AutoModelForCausalLM.from_pretrained(words[1]).num_parameters() > 0


class _Tiny(OPTSize):
    """A size that a test can hold."""

    def config(self, **changes: object) -> object:
        return super().config(**({"vocab_size": 62, "ffn_dim": 40, "max_position_embeddings": 32} | changes))


def test_the_python_block_runs() -> None:
    [block] = [block for block in blocks("python") if "OPT_SIZES" in block]
    exec(compile(block, "models.md", "exec"), {})
    assert round(sum(size.fp16_bytes for size in OPT_SIZES.values()) / 1e9) == 588
