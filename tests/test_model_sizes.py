"""The published OPT sizes: every config builds the model that its numbers say."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTForCausalLM

from zero.errors import UserError
from zero.models.sizes import OPT_SIZES, WIKITEXT2_PERPLEXITY, find_size, opt_size

# layers, heads, width (Zhang et al. 2022, table 1), parameters, fp16 GB, KV bytes per token
PUBLISHED = {
    "opt-125m": (12, 12, 768, 125_239_296, "0.25", 36_864),
    "opt-350m": (24, 16, 1024, 331_196_416, "0.66", 98_304),
    "opt-1.3b": (24, 32, 2048, 1_315_758_080, "2.63", 196_608),
    "opt-2.7b": (32, 32, 2560, 2_651_596_800, "5.30", 327_680),
    "opt-6.7b": (32, 32, 4096, 6_658_473_984, "13.3", 524_288),
    "opt-13b": (40, 40, 5120, 12_853_473_280, "25.7", 819_200),
    "opt-30b": (48, 56, 7168, 29_974_540_288, "59.9", 1_376_256),
    "opt-66b": (64, 72, 9216, 65_719_701_504, "131", 2_359_296),
    "opt-175b": (96, 96, 12288, 174_604_468_224, "349", 4_718_592),
}


def test_all_published_sizes_are_there() -> None:
    assert list(OPT_SIZES) == list(PUBLISHED) == list(WIKITEXT2_PERPLEXITY)
    assert list(WIKITEXT2_PERPLEXITY.values()) == sorted(WIKITEXT2_PERPLEXITY.values(), reverse=True)


@pytest.mark.parametrize("name", PUBLISHED)
class TestSize:
    def test_its_config_builds_a_model_of_the_published_count(self, name: str) -> None:
        layers, heads, width, numel, gigabytes, kv_bytes = PUBLISHED[name]
        size = opt_size(name)
        config = size.config()
        assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (layers, heads, width)
        assert (config.vocab_size, config.max_position_embeddings, config.ffn_dim) == (50272, 2048, 4 * width)
        with torch.device("meta"):
            model = OPTForCausalLM(config)
        # parameters() gives a tied one once.
        assert sum(p.numel() for p in model.parameters()) == size.parameter_numel == numel
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert f"{size.fp16_bytes / 1e9:.{len(gigabytes.partition('.')[2])}f}" == gigabytes
        assert size.kv_bytes_per_token == kv_bytes

    def test_only_350m_is_odd(self, name: str) -> None:
        with torch.device("meta"):
            decoder = OPTForCausalLM(opt_size(name).config(num_hidden_layers=1)).model.decoder
        odd = name == "opt-350m"
        assert (decoder.final_layer_norm is None) is odd
        assert (decoder.project_in is not None) is odd
        assert decoder.embed_tokens.weight.shape[1] == (512 if odd else decoder.config.hidden_size)
        assert decoder.layers[0].do_layer_norm_before is not odd

    def test_its_names(self, name: str) -> None:
        size = opt_size(name)
        assert size.hub_name == (None if name == "opt-175b" else f"facebook/{name}")
        assert find_size(name.upper()) is find_size(f"facebook/{name}") is size


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    assert find_size("gpt2") is None
    with pytest.raises(UserError, match=r"no OPT 'opt-126m'; did you mean 'opt-125m'\? Published are opt-125m, .*175b"):
        opt_size("opt-126m")


def test_changes_go_into_the_config_only() -> None:
    assert opt_size("opt-125m").config(attention_dropout=0.1).attention_dropout == 0.1
    assert opt_size("opt-125m").config().attention_dropout == 0.0
