"""Models and tokenizers from a config; the OPT family: its sizes, OPT as GPT-2 and back, metaseq checkpoints."""
