"""From documents to blocks of tokens (`pretokenize`), and from blocks to micro-batches (`blocks`).

Imports of the package: `checkpoint`, `distributed`, `flags`, `models`, `rng`, `runtime`. What `config` reads is free
of torch.
"""
