"""A small tokenizer made on the spot, for runs that cannot or should not download one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zero.data.sample import builtin_documents
from zero.errors import ConfigError

# OPT's first four ids, so that an OPT config's default bos (2), pad (1) and eos (2) are right with this tokenizer.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# Every byte has a token of its own, so that any text can be written and `<unk>` never occurs.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
DEFAULT_VOCAB_SIZE = 2048


def builtin_tokenizer(vocab_size: int = DEFAULT_VOCAB_SIZE, texts: Iterable[str] | None = None) -> Any:
    """Trains a byte-level BPE tokenizer; the same input gives the same tokenizer.

    As with OPT's tokenizer, ``</s>`` begins every text and also ends documents, and ``<pad>`` pads.

    Args:
        vocab_size: Number of tokens, the 256 bytes and 4 special tokens among them. Little text gives fewer.
        texts: What to train on. Default: the built-in sample.

    Returns:
        A ``PreTrainedTokenizerFast``: ``save_pretrained`` writes it, ``AutoTokenizer`` reads it back.

    Raises:
        ConfigError: ``vocab_size`` is below 260.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        least = f"at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        raise ConfigError([f"vocab_size = {vocab_size}: allowed is {least}"], source="built-in tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(builtin_documents() if texts is None else texts, trainer)
    eos_id = SPECIAL_TOKENS.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", eos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
