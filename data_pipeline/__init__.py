"""From text to batches: `prepare` writes a tokenized corpus, `stream` reads it back in a reproducible order.

sources -> tokenizer -> shards + manifest (prepare), then corpus -> order and mixture -> batches (stream).
"""
