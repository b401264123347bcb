"""A model becomes a GGUF file: metadata, tokenizer, and the writer that streams tensors to disk."""
