"""Evaluation: how much a quantized file differs from what it was made of.

Owns: perplexity of a checkpoint or of a GGUF file, through transformers' forward. Leaves out: the
encoders; nothing here rests on the code that made the file.
"""

from moequant.evaluate.perplexity import Perplexity, perplexity, text_windows

__all__ = ["Perplexity", "perplexity", "text_windows"]
