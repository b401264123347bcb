// The driver's API: its memory mapping is not used (GGML_CUDA_NO_VMM).
#pragma once
