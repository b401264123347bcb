"""Whether the MoE kernels of a llama.cpp compute what a GGUF file says: see `validate.run`."""
