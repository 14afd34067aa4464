"""Models and tokenizers from a config."""
