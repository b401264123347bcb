"""Evaluation: how much a quantized file differs from what it was made of.

Owns: perplexity of a checkpoint or of a GGUF file, through transformers' forward. Leaves out: the
encoders and decoders of ours: values are decoded by gguf's. Names, shapes and the configuration,
though, come from the same `ModelSpec` that the file was made from; whether the file's metadata,
tokenizer and names say the same to llama.cpp, only llama-perplexity shows.
"""

from moequant.evaluate.perplexity import Perplexity, perplexity, text_windows

__all__ = ["Perplexity", "perplexity", "text_windows"]
