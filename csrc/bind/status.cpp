// What the library says of itself: its errors in words, and how it was built.

#include <string>

#include "../include/triaxis.h"

#ifdef TRIAXIS_CUDA
extern "C" const char* cudaGetErrorString(int status);
#endif

extern "C" const char* triaxis_error_string(int status) {
  switch (status) {
    case 0: return "no error";
    case TRIAXIS_NO_CUBLASLT: return "libcublasLt.so.13 or .12 cannot be loaded";
    case TRIAXIS_OLD_CUBLASLT: return "scales of blocks need cuBLASLt 12.9 or newer";
    case TRIAXIS_NO_ALGORITHM: return "cuBLASLt has no matmul of these sizes, dtypes and scales on this GPU";
    case TRIAXIS_NOT_HOPPER: return "this kernel needs a GPU of compute capability 9.0 (H100, H200)";
    case TRIAXIS_NO_TENSOR_MAP: return "the driver makes no tensor map of these matrices (cuTensorMapEncodeTiled)";
    default: break;
  }
  if (status >= TRIAXIS_CUBLASLT_STATUS) {
    thread_local std::string text;
    text = "cuBLAS status " + std::to_string(status - TRIAXIS_CUBLASLT_STATUS);
    return text.c_str();
  }
#ifdef TRIAXIS_CUDA
  return cudaGetErrorString(status);
#else
  return "invalid argument";
#endif
}

#ifndef TRIAXIS_EMULATED
// Raise it with every change of an operator's schema or of a public function, together with SCHEMA_VERSION in engine/ops/native.py.
extern "C" __attribute__((visibility("default"))) int triaxis_schema_version() { return 8; }

// "CUDA kernels for 90a;80+PTX", or why there are none.
extern "C" __attribute__((visibility("default"))) const char* triaxis_build() { return TRIAXIS_BUILD; }
#endif
