// A libcublasLt that computes nothing: it returns algorithms with numbers and notes which one a matmul gets.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
constexpr uint64_t kFirst = 100, kEnd = 106;  // numbers of algorithms, the heuristic's order
constexpr uint64_t kBroken = 102;             // which the heuristic returns with a status
uint64_t limit;                               // of the workspace
int64_t descriptors;
}  // namespace

extern "C" {
uint64_t fake_algorithm;  // of the last matmul
int fake_requested, fake_heuristics;

int cublasLtCreate(void** handle) {
  *handle = &limit;
  return 0;
}
size_t cublasLtGetVersion() { return 130400; }
int cublasLtMatmulDescCreate(void** descriptor, int, int) {
  *descriptor = reinterpret_cast<void*>(++descriptors);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) {
  *layout = reinterpret_cast<void*>(++descriptors);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = reinterpret_cast<void*>(++descriptors);
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void* value, size_t) {
  std::memcpy(&limit, value, sizeof(limit));
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int requested, Heuristic* results, int* found) {
  fake_requested = requested;
  ++fake_heuristics;
  *found = 0;
  for (uint64_t number = kFirst; number < kEnd && *found < requested; ++number) {
    Heuristic result{};
    for (uint64_t& word : result.algorithm) word = ~number;  // all of an algorithm is kept
    result.algorithm[0] = number;
    result.state = number == kBroken ? 15 : 0;
    results[(*found)++] = result;
  }
  return 0;
}
int cublasLtMatmulAlgoCheck(
    void*, void*, void*, void*, void*, void*, const uint64_t* algorithm, Heuristic* result) {
  for (int i = 1; i < 8; ++i)
    if (algorithm[i] != ~algorithm[0]) return 7;
  if (algorithm[0] < kFirst || algorithm[0] >= kEnd) return 15;
  result->workspace_bytes = algorithm[0] == kEnd - 1 ? limit + 1 : limit;
  return 0;
}
int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const uint64_t* algorithm, void*, size_t, void*) {
  fake_algorithm = algorithm[0];
  return 0;
}
}
