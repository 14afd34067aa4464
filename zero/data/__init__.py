"""Training data for causal language models, from a name in the config to batches.

In the order data pass through: ``locate`` (what a source is), ``files``, ``rows``, ``tables``, ``readers`` and ``hub``
(rows), ``columns`` (a row's form), ``records``, ``sources`` (all of these together), ``chat`` and ``ids`` and
``tokenise`` (tokens and masks), ``packing`` and ``split`` (sequences), ``sampler`` and ``resumable`` (order, and each
rank's part of it), ``collate`` (batches), ``loaders`` (the whole way), ``preview`` (a sample for people to read).
``streaming`` and ``stream_loader`` go the same way while training, bit by bit. ``sample`` and ``tokenizer`` need no
network.
"""
