"""Liger's kernels: applied to the user's one model with our own loss kept, or refused with what to do.

Whether they compute right is for a GPU to show (test_accelerator.py); here a library of the same shape stands in.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cli_case import write_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import zero
from zero.cli.main import main
from zero.errors import ConfigError, UserError
from zero.liger import use_liger

GPU = SimpleNamespace(torch_device=torch.device("cuda"))
TABLE = "liger_kernel.transformers.monkey_patch"


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8
        )
    )


@pytest.fixture
def calls(monkeypatch):
    """What was asked of a stand-in for the library."""
    seen = []

    def apply_to_llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        seen.append((model, cross_entropy, fused_linear_cross_entropy, rope and rms_norm and swiglu))

    table = ModuleType(TABLE)
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama, "qwen3": lambda model: None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, TABLE, table)
    return seen


def test_one_model_gets_the_kernels_and_keeps_our_loss(calls):
    model = llama()
    use_liger(model, GPU)
    assert calls == [(model, False, False, True)]


def test_a_peft_model_gets_them_inside(calls):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    use_liger(model, GPU)
    assert [call[0] for call in calls] == [model.get_base_model()]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: OPTForCausalLM(OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                          word_embed_proj_dim=16, vocab_size=64)), "no kernels for opt"),
        (lambda: nn.Linear(2, 2), "no kernels for Linear"),
    ],
)  # fmt: skip
def test_a_model_it_does_not_know_is_refused_by_name(calls, model, said):
    with pytest.raises(UserError, match=f"{said}, only for llama, qwen3; set train.liger = false"):
        use_liger(model(), GPU)
    assert calls == []


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=r'install the extra with pip install .* -e "\.\[liger\]"'):
        use_liger(llama(), GPU)


def test_a_device_without_kernels_is_refused_before_the_model_is_touched(calls):
    with pytest.raises(UserError, match="Liger's kernels are made for GPUs, and this run computes on cpu"):
        use_liger(llama(), SimpleNamespace(torch_device=torch.device("cpu")))
    assert calls == []


@pytest.mark.parametrize("device", [{"type": "cpu"}, {"type": "simulated", "memory": "64MiB"}])
def test_a_config_that_names_such_a_device_is_refused_as_a_config(device):
    with pytest.raises(ConfigError, match="train.liger = true"):
        zero.initialize(llama(), config={"device": device, "train": {"liger": True}})


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_zero_plan_refuses_such_a_model_in_the_same_words_before_anything_is_loaded(verb, calls, tmp_path, capsys):
    config = write_config(tmp_path, device={"type": "auto"})
    words = ["--train.liger", "true", "--train.output_dir", str(tmp_path / "run")]
    assert main([verb, config, *words]) == 2
    assert "no kernels for opt, only for llama, qwen3; set train.liger = false" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_where_the_library_is_not_installed_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    config = write_config(tmp_path, device={"type": "auto"})
    assert main(["plan", config, "--train.liger", "true"]) == 0
    assert "it fits" in capsys.readouterr().out
