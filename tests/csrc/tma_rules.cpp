// One TMA copy, and one warp that gives a stage back, on the emulation: with what test_tma_rules.py plants in them.

#include "../../csrc/gemm/hopper.cuh"

namespace triaxis {
namespace {

using namespace hopper;

struct Copied {
  alignas(1024) unsigned char box[2048];
  alignas(8) unsigned char barriers[2][64];
};
constexpr size_t kBytes = sizeof(Copied) + 1024;

Copied& shared_memory() {
  DYNAMIC_SHARED(memory);
  return *reinterpret_cast<Copied*>(memory + (0u - shared_address(memory)) % 1024);
}

Barrier& barrier(Copied& shared, int which, int offset = 0) {
  return *reinterpret_cast<Barrier*>(shared.barriers[which] + offset);
}

struct Planted {
  int row, column, to, barrier;
};

void copy_kernel(TensorMap map, Planted planted) {
  Copied& shared = shared_memory();
  Barrier& full = barrier(shared, 0, planted.barrier);
  if (threadIdx.x == 0) {
    init(full, 1);
    arrive_expecting(full, map.box_rows * map.box_columns * map.bytes);
    copy(map, shared.box + planted.to, full, planted.row, planted.column);
  }
  __syncthreads();
  wait(full, 0);
  fence_reads();
}

enum Fault { kNone, kNoFence, kFenceBeforeTheRead, kOneLaneFences, kNoSyncwarp };

// Thread 32 copies twice to the same place; the first warp reads it, and arrives with one lane.
void ring_kernel(TensorMap map, Fault fault) {
  Copied& shared = shared_memory();
  Barrier &full = barrier(shared, 0), &empty = barrier(shared, 1);
  if (threadIdx.x == 0) init(full, 1), init(empty, 1);
  __syncthreads();
  for (uint32_t phase = 0; phase < 2; ++phase) {
    if (threadIdx.x == 32) {
      wait(empty, phase ^ 1);
      arrive_expecting(full, map.box_rows * map.box_columns * map.bytes);
      copy(map, shared.box, full, 0, 0);
    }
    if (threadIdx.x >= 32) continue;
    wait(full, phase);
    if (fault == kFenceBeforeTheRead) fence_reads();
    read_copied<1>(reinterpret_cast<float*>(shared.box) + threadIdx.x % 4);
    if (fault == kNone || fault == kNoSyncwarp || (fault == kOneLaneFences && threadIdx.x == 0)) fence_reads();
    if (fault != kNoSyncwarp) __syncwarp();
    if (threadIdx.x == 0) arrive(empty);
  }
}

// What `run` raises, or an empty string.
template <typename Run>
const char* message(const Run& run) {
  thread_local std::string text;
  text.clear();
  try {
    run();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

template <typename T>
void copy_box(const T* data, int rows, int columns, int box_rows, int box_columns, Planted planted) {
  TensorMap map;
  make_tensor_map(map, data, rows, columns, box_rows, box_columns);
  LAUNCH(copy_kernel, dim3(1), dim3(32), kBytes, nullptr, map, planted);
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

// `data`: `bytes` (1 or 4) an element.
extern "C" const char* copy_of_box(
    const void* data, int bytes, int rows, int columns, int box_rows, int box_columns, int row, int column, int to,
    int barrier) {
  const Planted planted{row, column, to, barrier};
  return message([&] {
    if (bytes == 1) copy_box(static_cast<const uint8_t*>(data), rows, columns, box_rows, box_columns, planted);
    if (bytes == 4) copy_box(static_cast<const float*>(data), rows, columns, box_rows, box_columns, planted);
  });
}

extern "C" const char* ring_of_one(const void* data, int fault) {
  return message([&] {
    TensorMap map;
    make_tensor_map(map, static_cast<const float*>(data), 4, 4, 1, 4);
    LAUNCH(ring_kernel, dim3(1), dim3(64), kBytes, nullptr, map, Fault(fault));
  });
}
