"""The choices that `moequant evaluate` offers by name; nothing heavy is imported with them.

Owns: these names. Leaves out: what they mean (`evaluate`).
"""

OURS, LLAMA_CPP = "moequant", "llama.cpp"
ENGINES = (OURS, LLAMA_CPP)
BASELINES = ("nf4", "int8")
