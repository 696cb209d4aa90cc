// FP8 matmuls by cuBLASLt, found at run time: torch has loaded it, so that neither its headers nor nvcc are needed.
//
// cuBLASLt is column-major: a row-major d = a · bᵀ is its dᵀ = b · aᵀ with the first operand transposed, which is the one
// layout that Hopper's FP8 instructions take. The algorithm that its heuristic chose for a shape is kept.

#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <tuple>

#include "../include/triaxis.h"

namespace {

using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

// Values of cublasLt.h and library_types.h, which have not changed since CUDA 12.
enum { kCompute32F = 68, kTranspose = 1, kMaxWorkspaceBytes = 1 };
enum { kTransA = 3, kAScale = 17, kBScale = 18, kFastAccumulation = 25 };
enum { kAScaleMode = 31, kBScaleMode = 32 };
enum { kScalar = 0, k1x128 = 4, k128x128 = 5 };
enum { kF32 = 0, kF16 = 2, kBF16 = 14, kE4M3 = 28, kE5M2 = 29 };
constexpr int kFirstStatus = TRIAXIS_CUBLASLT_STATUS, kBlockScalesSince = 120900;

struct Library {
  int (*create)(Handle*);
  size_t (*version)();
  int (*descriptor_create)(Descriptor*, int, int);
  int (*descriptor_set)(Descriptor, int, const void*, size_t);
  int (*layout_create)(Layout*, int, uint64_t, uint64_t, int64_t);
  int (*preference_create)(Preference*);
  int (*preference_set)(Preference, int, const void*, size_t);
  int (*heuristic)(Handle, Descriptor, Layout, Layout, Layout, Layout, Preference, int, Heuristic*, int*);
  int (*matmul)(Handle, Descriptor, const void*, const void*, Layout, const void*, Layout, const void*, const void*, Layout,
                void*, Layout, const Algorithm*, void*, size_t, void*);
  bool complete = true;

  Library() {
    void* found = nullptr;
    for (const int how : {RTLD_NOLOAD | RTLD_LAZY, RTLD_LAZY})  // first the version that torch has loaded
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
        if (found == nullptr) found = dlopen(name, how);
    find(found, "cublasLtCreate", create);
    find(found, "cublasLtGetVersion", version);
    find(found, "cublasLtMatmulDescCreate", descriptor_create);
    find(found, "cublasLtMatmulDescSetAttribute", descriptor_set);
    find(found, "cublasLtMatrixLayoutCreate", layout_create);
    find(found, "cublasLtMatmulPreferenceCreate", preference_create);
    find(found, "cublasLtMatmulPreferenceSetAttribute", preference_set);
    find(found, "cublasLtMatmulAlgoGetHeuristic", heuristic);
    find(found, "cublasLtMatmul", matmul);
  }

  template <typename Function>
  void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(library == nullptr ? nullptr : dlsym(library, name));
    complete = complete && function != nullptr;
  }
};

const Library& library() {
  static const Library only;
  return only;
}

struct Plan {
  Descriptor descriptor = nullptr;
  Layout a = nullptr, b = nullptr, d = nullptr;
  Algorithm algorithm{};
};

int type_of(triaxis_dtype dtype) {
  switch (dtype) {
    case TRIAXIS_F32: return kF32;
    case TRIAXIS_F16: return kF16;
    case TRIAXIS_BF16: return kBF16;
    case TRIAXIS_E4M3: return kE4M3;
    default: return kE5M2;
  }
}

int32_t mode_of(triaxis_scaling scaling) {
  return scaling == TRIAXIS_TENSORWISE ? kScalar : scaling == TRIAXIS_BLOCK_1X128 ? k1x128 : k128x128;
}

// Keeps the first status that is not 0.
struct Status {
  int value = 0;
  void operator()(int next) {
    if (value == 0 && next != 0) value = kFirstStatus + next;
  }
};

template <typename T>
int set(const Plan& plan, int attribute, const T& value) {
  return library().descriptor_set(plan.descriptor, attribute, &value, sizeof(value));
}

int set_pointers(const Plan& plan, const triaxis_fp8_matmul_args& x) {
  if (const int failed = set(plan, kAScale, x.b_scale_inv)) return failed;
  return set(plan, kBScale, x.a_scale_inv);
}

int make_plan(const triaxis_fp8_matmul_args& x, Handle handle, Plan& plan) {
  const Library& lt = library();
  Status status;
  status(lt.descriptor_create(&plan.descriptor, kCompute32F, kF32));
  if (status.value != 0) return status.value;
  status(set(plan, kTransA, int32_t(kTranspose)));
  status(set(plan, kFastAccumulation, int8_t(x.fast != 0)));
  if (x.a_scaling != TRIAXIS_TENSORWISE || x.b_scaling != TRIAXIS_TENSORWISE) {  // versions before 12.9 do not know the attribute
    status(set(plan, kAScaleMode, mode_of(x.b_scaling)));
    status(set(plan, kBScaleMode, mode_of(x.a_scaling)));
  }
  status(set_pointers(plan, x));  // or the heuristic refuses block scales, or chooses an algorithm that takes none
  status(lt.layout_create(&plan.a, type_of(x.b_dtype), uint64_t(x.k), uint64_t(x.n), x.k));
  status(lt.layout_create(&plan.b, type_of(x.a_dtype), uint64_t(x.k), uint64_t(x.m), x.k));
  status(lt.layout_create(&plan.d, type_of(x.out_dtype), uint64_t(x.n), uint64_t(x.m), x.n));
  Preference preference = nullptr;
  status(lt.preference_create(&preference));
  if (status.value != 0) return status.value;
  status(lt.preference_set(preference, kMaxWorkspaceBytes, &x.workspace_bytes, sizeof(x.workspace_bytes)));
  Heuristic best{};
  int found = 0;
  status(lt.heuristic(handle, plan.descriptor, plan.a, plan.b, plan.d, plan.d, preference, 1, &best, &found));
  if (status.value == 0 && found == 0) return TRIAXIS_NO_ALGORITHM;
  plan.algorithm = best.algorithm;
  return status.value;
}

using Key = std::tuple<int, int64_t, int64_t, int64_t, int, int, int, int, int, bool>;

}  // namespace

extern "C" int triaxis_fp8_matmul(const triaxis_fp8_matmul_args* args, int device, void* stream) {
  const triaxis_fp8_matmul_args& x = *args;
  const Library& lt = library();
  if (!lt.complete) return TRIAXIS_NO_CUBLASLT;
  const bool in_blocks = x.a_scaling != TRIAXIS_TENSORWISE || x.b_scaling != TRIAXIS_TENSORWISE;
  if (in_blocks && lt.version() < kBlockScalesSince) return TRIAXIS_OLD_CUBLASLT;
  if (x.m == 0 || x.n == 0 || x.k == 0) return 0;

  static std::mutex mutex;
  static std::map<int, Handle> handles;
  static std::map<Key, Plan> plans;
  const std::lock_guard<std::mutex> guard(mutex);  // the scale pointers of a plan change from call to call
  Handle& handle = handles[device];
  if (handle == nullptr) {
    if (const int failed = lt.create(&handle)) return kFirstStatus + failed;
  }
  const Key key{device, x.m, x.n, x.k, x.a_dtype, x.b_dtype, x.out_dtype, x.a_scaling, x.b_scaling, x.fast != 0};
  auto found = plans.find(key);
  if (found == plans.end()) {
    Plan plan;
    if (const int failed = make_plan(x, handle, plan)) return failed;
    found = plans.emplace(key, plan).first;
  }
  const Plan& plan = found->second;
  Status status;
  status(set_pointers(plan, x));
  if (status.value != 0) return status.value;
  const float alpha = 1.0f, beta = x.accumulate ? 1.0f : 0.0f;
  status(lt.matmul(handle, plan.descriptor, &alpha, x.b, plan.a, x.a, plan.b, &beta, x.out, plan.d, x.out, plan.d,
                   &plan.algorithm, x.workspace, size_t(x.workspace_bytes), stream));
  return status.value;
}
