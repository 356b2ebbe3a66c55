"""Text sources, tokenizer, packed token streams and batches."""
