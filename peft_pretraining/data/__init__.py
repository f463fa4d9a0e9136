"""From documents to blocks of tokens (`pretokenize`), and from blocks to micro-batches (`blocks`)."""
