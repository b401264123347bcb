"""moequant: a Mixture-of-Experts checkpoint in, the best GGUF file of its size out."""

__version__ = "0.1.0"
