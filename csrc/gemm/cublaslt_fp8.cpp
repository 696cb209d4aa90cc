// FP8 matmuls by cuBLASLt, found at run time: torch has loaded it, so that neither its headers nor nvcc are needed.
//
// cuBLASLt is column-major: a row-major d = a · bᵀ is its dᵀ = b · aᵀ with the first operand transposed, which is the one
// layout that Hopper's FP8 instructions take. A shape keeps its plan: the algorithm that the heuristic puts first, until
// triaxis_fp8_use_algorithm replaces it, by one that engine/ops/fp8_algorithms.py has measured.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "../include/triaxis.h"

namespace {

using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[TRIAXIS_FP8_ALGORITHM_BYTES / 8];
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
  int (*check)(Handle, Descriptor, Layout, Layout, Layout, Layout, const Algorithm*, Heuristic*);
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
    find(found, "cublasLtMatmulAlgoCheck", check);
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
  Preference preference = nullptr;
  uint64_t workspace_bytes = 0;
  Algorithm algorithm{};
};

// device, m, n, k, dtypes of a, b and out, scalings of a and b, fast
using Key = std::array<int64_t, TRIAXIS_FP8_PLAN_SIZE>;

struct Plans {
  std::mutex mutex;  // also because the scale pointers of a plan change from call to call
  std::map<int, Handle> handles;
  std::map<Key, Plan> by_key;
};

Plans& plans() {
  static Plans only;
  return only;
}

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

// The first `most` algorithms that can run, in the order of the heuristic.
int find_algorithms(Handle handle, const Plan& plan, int most, Algorithm* algorithms, int& found) {
  std::vector<Heuristic> results(static_cast<size_t>(most));
  int returned = 0;
  found = 0;
  if (const int failed = library().heuristic(handle, plan.descriptor, plan.a, plan.b, plan.d, plan.d, plan.preference, most,
                                             results.data(), &returned))
    return kFirstStatus + failed;
  for (int i = 0; i < returned; ++i)
    if (results[size_t(i)].state == 0) algorithms[found++] = results[size_t(i)].algorithm;
  return found == 0 ? TRIAXIS_NO_ALGORITHM : 0;
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
  status(lt.preference_create(&plan.preference));
  if (status.value != 0) return status.value;
  plan.workspace_bytes = x.workspace_bytes;
  status(lt.preference_set(plan.preference, kMaxWorkspaceBytes, &x.workspace_bytes, sizeof(x.workspace_bytes)));
  if (status.value != 0) return status.value;
  int found = 0;
  return find_algorithms(handle, plan, 1, &plan.algorithm, found);
}

// Calls `use` with the plan of `key` and its handle.
template <typename Use>
int with_plan(const int64_t* key, Use use) {
  Key wanted;
  std::copy_n(key, wanted.size(), wanted.begin());
  Plans& all = plans();
  const std::lock_guard<std::mutex> guard(all.mutex);
  const auto found = all.by_key.find(wanted);
  return found == all.by_key.end() ? TRIAXIS_NO_ALGORITHM : use(all.handles[int(wanted[0])], found->second);
}

}  // namespace

extern "C" int triaxis_fp8_matmul(const triaxis_fp8_matmul_args* args, int device, void* stream) {
  const triaxis_fp8_matmul_args& x = *args;
  const Library& lt = library();
  if (!lt.complete) return TRIAXIS_NO_CUBLASLT;
  const bool in_blocks = x.a_scaling != TRIAXIS_TENSORWISE || x.b_scaling != TRIAXIS_TENSORWISE;
  if (in_blocks && lt.version() < kBlockScalesSince) return TRIAXIS_OLD_CUBLASLT;
  if (x.m == 0 || x.n == 0 || x.k == 0) return 0;

  Plans& all = plans();
  const std::lock_guard<std::mutex> guard(all.mutex);
  Handle& handle = all.handles[device];
  if (handle == nullptr) {
    if (const int failed = lt.create(&handle)) return kFirstStatus + failed;
  }
  const Key key{device, x.m, x.n, x.k, x.a_dtype, x.b_dtype, x.out_dtype, x.a_scaling, x.b_scaling, x.fast != 0};
  auto found = all.by_key.find(key);
  if (found == all.by_key.end()) {
    Plan plan;
    if (const int failed = make_plan(x, handle, plan)) return failed;
    found = all.by_key.emplace(key, plan).first;
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

extern "C" uint64_t triaxis_cublaslt_version() { return library().complete ? library().version() : 0; }

extern "C" int triaxis_fp8_plans(int64_t* keys, int most) {
  Plans& all = plans();
  const std::lock_guard<std::mutex> guard(all.mutex);
  int written = 0;
  for (auto it = all.by_key.begin(); it != all.by_key.end() && written < most; ++it, ++written)
    std::copy(it->first.begin(), it->first.end(), keys + TRIAXIS_FP8_PLAN_SIZE * written);
  return int(all.by_key.size());
}

extern "C" int triaxis_fp8_algorithms(const int64_t* key, int most, void* algorithms, int* found) {
  return with_plan(key, [&](Handle handle, const Plan& plan) {
    return find_algorithms(handle, plan, most, static_cast<Algorithm*>(algorithms), *found);
  });
}

extern "C" int triaxis_fp8_use_algorithm(const int64_t* key, const void* algorithm) {
  return with_plan(key, [&](Handle handle, Plan& plan) -> int {
    Algorithm wanted;
    std::memcpy(&wanted, algorithm, sizeof(wanted));
    Heuristic needs{};
    if (const int failed = library().check(handle, plan.descriptor, plan.a, plan.b, plan.d, plan.d, &wanted, &needs))
      return kFirstStatus + failed;
    if (needs.workspace_bytes > plan.workspace_bytes) return TRIAXIS_NO_ALGORITHM;
    plan.algorithm = wanted;
    return 0;
  });
}
