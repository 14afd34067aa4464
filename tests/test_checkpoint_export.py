"""An exported checkpoint is a folder that plain transformers loads, with the logits of the engine's model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from tests.checkpoint_helpers import Setting, Trainer, batches
from tests.engine_models import MODELS
from zero.checkpoint import CheckpointError, export, tensorfile, verify

IDS = batches(1)[0]["input_ids"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_export_loads_in_plain_transformers(tmp_path: Path, model: str, dtype: str) -> None:
    """Tied and untied heads, transposed layers, projections, experts: no key missing or left over, equal logits."""
    trainer = Trainer(Setting(model, dtype=dtype)).run(batches(2))
    checkpoint = trainer.save(tmp_path / "run" / "checkpoints")
    export(tmp_path / "run", tmp_path / "hf")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(loaded.parameters()).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(_logits(loaded), _logits(trainer.engine.module))
    trainer.engine.save_pretrained(tmp_path / "direct")
    assert _tensors(tmp_path / "hf").keys() == _tensors(tmp_path / "direct").keys()
    assert verify(checkpoint) == []


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found


def test_export_in_another_dtype(tmp_path: Path) -> None:
    """fp32 gives the master weights of a bf16 run; the config says so."""
    trainer = Trainer(Setting("llama", dtype="bf16")).run(batches(2))
    export(trainer.save(tmp_path), tmp_path / "hf", "fp32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for tensor in trainer.engine._tensors.values():
        master = tensor.chunk.companion_of(tensor, "master")
        assert torch.equal(loaded.get_parameter(tensor.name), master)
    with pytest.raises(CheckpointError, match="dtype 'int4' is unknown; allowed are fp32, bf16, fp16"):
        export(tmp_path, tmp_path / "no", "int4")


def test_shards_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of bounded length with an index, written in blocks smaller than a tensor."""
    trainer = Trainer(Setting("gpt2")).run(batches(1))
    checkpoint = trainer.save(tmp_path)
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(sys.modules["zero.checkpoint.export"], "SHARD_BYTES", 40_000)
    largest = 0
    blocks = tensorfile.read_blocks

    def watched(*args: Any) -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal largest
        for start, block in blocks(*args):
            largest = max(largest, block.nbytes)
            yield start, block

    monkeypatch.setattr("zero.checkpoint.reading.read_blocks", watched)
    export(checkpoint, tmp_path / "hf")
    assert 0 < largest <= 1000
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(tmp_path / "hf").values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(_logits(loaded), _logits(trainer.engine.module))


def test_memory_in_another_order(tmp_path: Path) -> None:
    """A parameter stored column by column is exported row by row."""

    def prepare(model: nn.Module) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()

    trainer = Trainer(Setting("llama", prepare=prepare)).run(batches(1))
    export(trainer.save(tmp_path), tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(_logits(loaded), _logits(trainer.engine.module))


def test_adapters(tmp_path: Path) -> None:
    """A LoRA run exports its adapter, with or without the frozen weights in the checkpoint."""
    peft = pytest.importorskip("peft")
    import zero

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.1)
    model = peft.get_peft_model(MODELS["llama"](), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = zero.initialize(model, optimizer, config={"device": {"type": "cpu"}})[0]
    for batch in batches(2):
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
    checkpoint = engine.save_checkpoint(tmp_path, include_frozen=False)
    export(checkpoint, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "adapter")
    assert torch.equal(_logits(loaded), _logits(engine.module))
    assert sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) < 150_000


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    """A tokenizer object or its folder ends up in the export; code does not."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    trainer = Trainer(Setting("llama"))
    export(trainer.save(tmp_path / "one", tokenizer=tokenizer), tmp_path / "hf1")
    (tmp_path / "hf1" / "code.py").write_text("raise SystemExit")
    export(trainer.save(tmp_path / "two", tokenizer=tmp_path / "hf1"), tmp_path / "hf2")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf2").get_vocab() == {"a": 0, "b": 1, "?": 2}
    assert not (tmp_path / "hf2" / "code.py").exists()
    for wrong in (3, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="tokenizer: "):
            trainer.save(tmp_path / "three", tokenizer=wrong)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    """Damaged, no frozen values, a folder that is in use: refused, and nothing is left behind."""

    def prepare(model: nn.Module) -> None:
        model.model.embed_tokens.requires_grad_(False)

    trainer = Trainer(Setting("llama", prepare=prepare))
    small = trainer.save(tmp_path / "small", include_frozen=False)
    with pytest.raises(CheckpointError, match=r"1 frozen parameters are not in it .*include_frozen=False"):
        export(small, tmp_path / "hf")
    good = trainer.save(tmp_path / "good")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        export(good, tmp_path / "used")
    (good / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"damaged and was not loaded:\n.*state\.json"):
        export(good, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "small", "used"]


def test_export_needs_no_transformers(tmp_path: Path) -> None:
    """The export runs where transformers cannot be imported: no model is built."""
    checkpoint = Trainer(Setting("opt-pre-norm")).save(tmp_path)
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from zero.checkpoint import export\n"
        f"export({str(checkpoint)!r}, {str(tmp_path / 'hf')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() > 0
