"""Sizes of the tiny models in `tests.zoo`: one table by field name, one by model type."""

from __future__ import annotations

from typing import Any

VOCAB = 128
FIRST_SPECIAL_ID = 96  # random input ids stay below; ids of images, padding and so on are above

# By value, the names of the fields that get it where the architecture's own default is larger.
_SIZES: dict[int, str] = {
    VOCAB: """vocab_size vocab_size_per_layer_input n_vocab unpadded_vocab_size shape_vocab_size
        pronunciation_vocab_size max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_target_positions max_source_positions mm_posemb_size position_embedding_size""",
    64: "mamba_d_ssm",
    48: """intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff dim_ff n_inner d_inner ffn_hidden_size mlp_dim
        dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size feed_forward_size""",
    32: """hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim backbone_hidden_size embedding_dim
        hidden_size_global lru_width input_embedding_size output_embedding_size out_hidden_size output_proj_dims
        mm_embed_dim audio_embed_dim adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size
        output_channels projector_input_dim projector_output_dim vision_output_dim ext_pw_out_channel
        depthwise_separable_out_channel nemo_conv_channels""",
    16: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size kv_lora_rank q_lora_rank
        o_lora_rank shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        hidden_size_per_layer_input laurel_rank router_hidden_size adapter_rank gated_norm_rank rel_extent
        pronunciation_embed_dim shape_embed_dim hc_lowrank num_centroids""",
    8: """head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim swa_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim kv_channels dim_head rotary_dim mamba_d_state state_size ssm_state_size
        mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim num_mel_bins input_feat_size feature_size image_size
        crop_size bias_max_distance""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads index_n_heads
        linear_num_value_heads linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts
        sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size
        chunk_size mamba_chunk_size block_multiple_of patch_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_blocks depth num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads
        linear_num_key_heads num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts index_topk n_groups n_group
        mamba_n_groups o_groups num_random_blocks block_size num_dense_layers zero_expert_num num_kv_shared_layers
        conf_num_hidden_layers""",
    1: "topk_group first_k_dense_replace num_nextn_predict_layers moe_layer_start_index",
}

TINY: dict[str, int] = {name: value for value, names in _SIZES.items() for name in names.split()}

_TWO_KINDS = ["sliding_attention", "full_attention"]
_GEMMA4: dict[str, Any] = {"global_head_dim": 16, "num_hidden_layers": 4, "layer_types": _TWO_KINDS * 2}
_GEMMA4_SHARED: dict[str, Any] = _GEMMA4 | {"num_kv_shared_layers": 2}
_GEMMA4_MOE: dict[str, Any] = _GEMMA4 | {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16
}  # fmt: skip
_GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": _TWO_KINDS * 2, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}  # fmt: skip
_DOTS3: dict[str, Any] = {"head_dim": 16} | {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_QWEN4: dict[str, Any] = {
    "ple_layer_ids": [1], "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2, "eos_token_id": 2,
}  # fmt: skip
_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    "moe_layers": [1],
}  # fmt: skip
_DENSE_MOE = ["dense", "sparse"]

# What the field table cannot know, by model type. Keys of sub-configs hold dictionaries.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    # Sparse attention from 15 tokens on; with fewer, big_bird puts other attention modules in place of its own.
    "big_bird": {"num_random_blocks": 1},
    # With a cache, its code asks for a field that its config lacks.
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "cohere2_moe": {
        "num_hidden_layers": 2, "layer_types": _TWO_KINDS, "mlp_layer_types": _DENSE_MOE, "num_shared_experts": 1,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        }
    },
    # Its attention code clamps always and reads a field the config lacks by default; checkpoints set both.
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_rms_norm": True},
    "flint": {"mlp_only_layers": [0]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4_SHARED | {"use_double_wide_mlp": True}},
    "gemma4_text": _GEMMA4_MOE,
    "gemma4_unified": {"text_config": _GEMMA4_SHARED},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoe_swa": {"shared_intermediate_size": 16},
    "granitemoehybrid": {
        "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "position_embedding_type": "rope",
    },
    "granitemoeshared": {"shared_intermediate_size": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {"mlp_layer_types": _DENSE_MOE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "num_hidden_layers": 4},
    "laguna": {"layer_types": _TWO_KINDS, "num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8},
    "mellum": {"num_hidden_layers": 2, "layer_types": _TWO_KINDS, "mlp_layer_types": _DENSE_MOE},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": _DENSE_MOE, "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    # Its training path draws a seed from the system, so neither hashing nor dropout may use the random generator.
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4,
        "hash_seed": 0, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "stablelm": {"qk_layernorm": True},
    # With a cache, its state is updated in place and backward fails.
    "xlstm": {
        "use_cache": False, "hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 5, "layers_block_type": ["linear_attention"] + ["hybrid"] * 4, "num_mem_blocks": 2,
        "num_key_value_heads": 4, "use_shared_attention_adapter": True, "use_mem_rope": True,
    },
}  # fmt: skip

_NO_LOSS = "a draft model for speculative decoding: forward takes the target's hidden and key-value states, no labels"
NOT_BUILT: dict[str, str] = {"gemma4_assistant": _NO_LOSS, "gemma4_unified_assistant": _NO_LOSS}
