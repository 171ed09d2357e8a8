"""Data: JSONL records (schema), templates and tokens (chat, template), batches (collate), epochs (order)."""
