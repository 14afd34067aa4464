"""OPT fine-tuning in the Python form of Colossal-AI configs; every option keeps the meaning it had there.

    zero validate configs/gemini_zero.py
    zero train configs/gemini_zero.py

A Python config is a program: it is executed when it is named on the command line or given to `zero.launch`. New configs
are better written in TOML (see the other files of this folder); `zero validate` prints what this one amounts to.
"""

# ruff: noqa: C408 - the old form writes tables as dict(...)

from zero import TensorShardStrategy

# Upper-case names are free variables for your own script (`config.variables`). `zero train` reads the well-known ones:
# BATCH_SIZE as train.per_device_train_batch_size, NUM_EPOCHS as train.num_train_epochs, SEQ_LEN as data.seq_length.
BATCH_SIZE = 8
NUM_EPOCHS = 3
SEQ_LEN = 512

# `zero` trains in fp16 with fp32 master weights, as it always did; bf16=True in model_config makes it bf16.
zero = dict(
    model_config=dict(
        shard_strategy=TensorShardStrategy(),
        tensor_placement_policy="auto",  # memory.policy: "auto", "cuda" or "cpu"
        reuse_fp16_shard=True,  # always done where it can be; accepted with a line in the log
    ),
    optimizer_config=dict(
        gpu_margin_mem_ratio=0.8,  # no ratio to tune any more: "auto" uses all spare device memory; one line in the log
        initial_scale=2**14,  # precision.initial_scale
    ),
)

clip_grad_norm = 1.0  # train.max_grad_norm
gradient_accumulation = 4  # train.gradient_accumulation_steps

# data x pipeline x tensor.size ranks, for example dict(pipeline=2, tensor=dict(mode="2.5d", depth=1, size=4)).
parallel = dict(pipeline=1, tensor=dict(mode=None, size=1))

# Tables of the new form may stand beside the old ones. A script that builds its own model and optimizer needs none.
model = dict(name_or_path="facebook/opt-125m")
data = dict(train="Salesforce/wikitext", dataset_config="wikitext-2-raw-v1")
optimizer = dict(name="adamw", lr=5e-5, weight_decay=0.01)
