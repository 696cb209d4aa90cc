// FP8 products with scales of blocks, for Hopper: D = A · Bᵀ, both E4M3, with scales for each 128 elements along k.
//
// One block a multiprocessor goes from tile to tile of D. A warp of it copies tiles of A and B, and their scales, into a
// ring of stages; three warpgroups multiply 64 rows each. The tensor cores add up the 128 products between two scales,
// in about 14 bits; times the scales, these sums are added in fp32 registers, and meanwhile the tensor cores work for the
// other two warpgroups. Tiles of 192 × 128 ask a sixth less of L2 than tiles of 128 × 128; two sets of accumulators leave
// no registers for larger ones. Rejected: clusters that share what they copy, which the emulation could not run.

#include "hopper.cuh"

namespace triaxis {
namespace {

using namespace hopper;

constexpr int kConsumers = 3, kStages = 5, kGroup = 8;
constexpr int kTileM = kConsumers * kProductM, kTileN = kProductN, kTileK = 128;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last warpgroup copies
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
constexpr int kSquareScales = 4;  // copies take 16 bytes or more: one scale is used
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

struct Shared {
  uint8_t a[kStages][kTileM * kTileK], b[kStages][kTileN * kTileK];
  float a_scale_inv[kStages][kTileM], b_scale_inv[kStages][kTileN];
  Barrier full[kStages], empty[kStages];
};
constexpr int kAlignment = kSwizzle * kSwizzleRows;
constexpr int kSharedBytes = sizeof(Shared) + kAlignment;  // room to start at a multiple
static_assert(kSharedBytes <= 227 * 1024);
static_assert(sizeof(Shared::a[0]) % kAlignment == 0 && sizeof(Shared::b[0]) % kAlignment == 0);

struct Product {
  TensorMap a, b, a_scale_inv, b_scale_inv;
  void* out;
  int m, n, tiles_m, tiles_n, blocks_k, accumulate;
};

struct Tile {
  int m, n;
};

// The order of the tiles: kGroup of them one below the other, then the next column of them, so that blocks that run
// together read the same parts of A and B from L2.
__host__ __device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int group = index / (kGroup * tiles_n), within = index % (kGroup * tiles_n), above = group * kGroup;
  const int height = tiles_m - above < kGroup ? tiles_m - above : kGroup;
  return {above + within % height, within / height};
}

// Where in the ring a thread is, and the parity of the barriers' phase there.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <bool kBRows>
__device__ void produce(const Product& p, Shared& shared) {
  constexpr int kBScales = kBRows ? kTileN : kSquareScales;
  constexpr int kBytes = sizeof(Shared::a[0]) + sizeof(Shared::b[0]) + (kTileM + kBScales) * sizeof(float);
  Ring ring;
  for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
    const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
    for (int k = 0; k < p.blocks_k; ++k, ring.next()) {
      wait(shared.empty[ring.stage], ring.parity ^ 1);
      Barrier& full = shared.full[ring.stage];
      arrive_expecting(full, kBytes);
      copy(p.a, shared.a[ring.stage], full, tile.m * kTileM, k * kTileK);
      copy(p.b, shared.b[ring.stage], full, tile.n * kTileN, k * kTileK);
      copy(p.a_scale_inv, shared.a_scale_inv[ring.stage], full, k, tile.m * kTileM);
      if (kBRows) copy(p.b_scale_inv, shared.b_scale_inv[ring.stage], full, k, tile.n * kTileN);
      if (!kBRows) copy(p.b_scale_inv, shared.b_scale_inv[ring.stage], full, tile.n, k);
    }
  }
}

// Adds the sums of 128 products, times their scales; those of `a` start at the warpgroup's first row.
template <bool kBRows>
__device__ __forceinline__ void promote(
    float (&total)[kFragment], const float (&part)[kFragment], const float* a_scale_inv, const float* b_scale_inv, int thread) {
  const float of_row[2] = {a_scale_inv[fragment_row(thread, 0)], a_scale_inv[fragment_row(thread, 2)]};
  const float of_square[2] = {of_row[0] * b_scale_inv[0], of_row[1] * b_scale_inv[0]};
#pragma unroll
  for (int i = 0; i < kFragment; i += 4) {
    const Vec<float, 2> of_column = kBRows ? load<2>(b_scale_inv + fragment_column(thread, i)) : Vec<float, 2>{};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      total[i + j] += part[i + j] * (kBRows ? of_row[j / 2] * of_column.at[j % 2] : of_square[j / 2]);
  }
}

// fp32: a quad of lanes writes 32 adjacent bytes. (`first_row`, `first_column`) is where the warpgroup's part starts.
__device__ __forceinline__ void store_tile(
    const Product& p, float* out, float (&total)[kFragment], int first_row, int first_column, int thread) {
  const auto at = [&](int i) {
    return out + int64_t(first_row + fragment_row(thread, i)) * p.n + first_column + fragment_column(thread, i);
  };
  const auto inside = [&](int i) {
    return first_row + fragment_row(thread, i) < p.m && first_column + fragment_column(thread, i) < p.n;
  };
  Vec<float, 2> before[kFragment / 2] = {};
  if (p.accumulate) {
#pragma unroll
    for (int i = 0; i < kFragment; i += 2)
      if (inside(i)) before[i / 2] = load<2>(at(i));
  }
#pragma unroll
  for (int i = 0; i < kFragment; i += 2)
    if (inside(i)) store(at(i), Vec<float, 2>{total[i] + before[i / 2].at[0], total[i + 1] + before[i / 2].at[1]});
}

// Lane q of a quad gets word q of each of its four lanes, in their order.
__device__ __forceinline__ void turn(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + distance];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      (upper ? low : high) = got;
    }
  }
}

// bf16: a quad's pairs of four times eight columns change lanes, so that each lane writes eight columns, the quad 64 bytes.
__device__ __forceinline__ void store_tile(
    const Product& p, __nv_bfloat16* out, float (&total)[kFragment], int first_row, int first_column, int thread) {
#pragma unroll
  for (int half = 0; half < 4; half += 2) {
    const int row = first_row + fragment_row(thread, half);
#pragma unroll
    for (int first = 0; first < kFragment; first += 16) {
      Vec<uint32_t, 4> words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = first + 4 * j + half;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(total[i], total[i + 1]);
        words.at[j] = reinterpret_cast<const uint32_t&>(pair);
      }
      turn(words.at, thread);
      const int column = first_column + 2 * first + thread % 4 * 8;
      if (row < p.m && column < p.n) store(reinterpret_cast<uint32_t*>(out + int64_t(row) * p.n + column), words);
    }
  }
}

template <typename T, bool kBRows>
__device__ void consume(const Product& p, Shared& shared) {
  const int thread = threadIdx.x % kWarpgroup;
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);  // has the compiler know it as uniform
  Ring ring;
  for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
    float total[kFragment] = {}, part[kFragment];
    for (int k = 0; k < p.blocks_k; ++k, ring.next()) {
      wait(shared.full[ring.stage], ring.parity);
      const uint64_t a = descriptor(shared_address(shared.a[ring.stage] + group * kProductM * kTileK));
      const uint64_t b = descriptor(shared_address(shared.b[ring.stage]));
      begin_products(part);
#pragma unroll
      for (int at = 0; at < kTileK; at += kProductK) multiply(part, along(a, at), along(b, at), at > 0);
      commit_products();
      finish_products(part);
      promote<kBRows>(total, part, shared.a_scale_inv[ring.stage] + group * kProductM, shared.b_scale_inv[ring.stage], thread);
      __syncwarp();
      if (thread % kWarp == 0) arrive(shared.empty[ring.stage]);
    }
    const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
    store_tile(p, static_cast<T*>(p.out), total, tile.m * kTileM + group * kProductM, tile.n * kTileN, thread);
  }
}

template <typename T, bool kBRows>
__global__ void __launch_bounds__(kThreads, 1) fp8_matmul(const __grid_constant__ Product p) {
  if (!hopper::kCompiledFor) return;
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory + (0u - shared_address(memory)) % kAlignment);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init(shared.full[stage], 1);
      init(shared.empty[stage], kConsumers * kWarpgroup / kWarp);
    }
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    take_registers<kConsumerRegisters>();
    consume<T, kBRows>(p, shared);
  } else {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce<kBRows>(p, shared);
  }
}

template <typename T, bool kBRows>
int start(const Product& p, int device, void* stream) {
  const auto kernel = fp8_matmul<T, kBRows>;
#ifdef __CUDACC__
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return TRIAXIS_NOT_HOPPER;
  const int failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (failed != 0) return failed;
#else
  (void)device;
#endif
  const int grid = persistent_grid(kernel, kThreads, p.tiles_m * p.tiles_n);
  return LAUNCH(kernel, dim3(grid), dim3(kThreads), kSharedBytes, stream, p);
}

bool valid(const triaxis_fp8_matmul_args& x) {
  const auto size = [](int64_t s) { return s >= 0 && s % 16 == 0 && s <= 1 << 24; };
  return size(x.m) && size(x.n) && size(x.k) && x.k > 0 && reinterpret_cast<uintptr_t>(x.out) % 16 == 0 &&
         x.a_dtype == TRIAXIS_E4M3 && x.b_dtype == TRIAXIS_E4M3 && x.a_scaling == TRIAXIS_BLOCK_1X128 &&
         x.b_scaling != TRIAXIS_TENSORWISE &&
         (x.out_dtype == TRIAXIS_F32 || (x.out_dtype == TRIAXIS_BF16 && !x.accumulate)) &&
         ceil_div(x.m, kTileM) * ceil_div(x.n, kTileN) < 1 << 30;
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_fp8_matmul_sm90(const triaxis_fp8_matmul_args* args, int device, void* stream) {
  const triaxis_fp8_matmul_args& x = *args;
  if (!valid(x)) return kInvalidArgument;
  if (x.m == 0 || x.n == 0) return 0;
  const bool b_rows = x.b_scaling == TRIAXIS_BLOCK_1X128;
  const int64_t blocks_k = ceil_div(x.k, kTileK), blocks_n = ceil_div(x.n, kTileN);
  Product p{};
  p.out = x.out;
  p.m = int(x.m);
  p.n = int(x.n);
  p.tiles_m = int(ceil_div(x.m, kTileM));
  p.tiles_n = int(blocks_n);
  p.blocks_k = int(blocks_k);
  p.accumulate = x.accumulate;
  const auto* const a = static_cast<const uint8_t*>(x.a);
  const auto* const b = static_cast<const uint8_t*>(x.b);
  int failed = make_tensor_map(p.a, a, x.m, x.k, kTileM, kTileK);
  if (failed == 0) failed = make_tensor_map(p.b, b, x.n, x.k, kTileN, kTileK);
  if (failed == 0) failed = make_tensor_map(p.a_scale_inv, x.a_scale_inv, blocks_k, x.m, 1, kTileM);
  if (failed == 0)
    failed = b_rows ? make_tensor_map(p.b_scale_inv, x.b_scale_inv, blocks_k, x.n, 1, kTileN)
                    : make_tensor_map(p.b_scale_inv, x.b_scale_inv, blocks_n, ceil_div(blocks_k, 4) * 4, 1, kSquareScales);
  if (failed != 0) return failed;
  if (x.out_dtype == TRIAXIS_F32)
    return b_rows ? start<float, true>(p, device, stream) : start<float, false>(p, device, stream);
  return b_rows ? start<__nv_bfloat16, true>(p, device, stream) : start<__nv_bfloat16, false>(p, device, stream);
}
