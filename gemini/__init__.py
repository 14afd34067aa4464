"""Where every byte is, and when it moves: tensors, bytes and time; no model, no rank, no optimizer formula."""
