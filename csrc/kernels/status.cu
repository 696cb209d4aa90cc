#include "../common/device.cuh"

extern "C" const char* triaxis_error_string(int status) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return status == 0 ? "no error" : "invalid argument";
#endif
}
