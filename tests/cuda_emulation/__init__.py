"""A host emulation of CUDA that runs llama.cpp's MoE kernels as they are written, without a GPU.

`include/cuda_runtime.h` says what is emulated, what is not, and what that cannot prove.
"""
