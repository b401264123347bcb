// cuBLAS: types alone, for the context of ggml's CUDA backend. Nothing that is run here calls it.
#pragma once
#include "cuda_runtime.h"

typedef struct emu_cublas * cublasHandle_t;
typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum { CUBLAS_TF32_TENSOR_OP_MATH = 3 };
#define CUBLAS_VER_MAJOR 12
#define CUBLAS_VER_MINOR 4
static inline const char * cublasGetStatusString(cublasStatus_t) { return "not emulated"; }
static inline int cublasCreate(cublasHandle_t *) { return CUBLAS_STATUS_NOT_SUPPORTED; }
static inline int cublasSetMathMode(cublasHandle_t, int) { return CUBLAS_STATUS_NOT_SUPPORTED; }
static inline int cublasSetStream(cublasHandle_t, cudaStream_t) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
static inline int cublasSetWorkspace(cublasHandle_t, void *, size_t) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
