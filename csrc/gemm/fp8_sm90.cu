// FP8 matmul with block scales for Hopper: D = A · Bᵀ, both E4M3, with a scale for every 128 elements along k.
//
// A persistent block on each multiprocessor goes from tile to tile of D. One thread, the producer, copies tiles of A and B
// and their scales by TMA into a ring of stages; three consumer warpgroups compute 64 rows each. The tensor cores sum the
// 128 products of a scale block, in about 14 bits; the consumers multiply this partial sum by its scales and add it to fp32
// accumulators in registers, while the tensor cores work for the other two warpgroups. Alternative considered: clusters
// whose blocks share copies, which the emulation could not run.

#include "hopper.cuh"

namespace triaxis {
namespace {

using namespace hopper;

// Tiles of 192 × 128 read a sixth less from L2 than tiles of 128 × 128. Larger ones do not fit: a consumer has two sets of
// accumulators (the partial and the total sum), 64 registers each.
constexpr int kConsumers = 3;
constexpr int kTileM = kConsumers * kMmaM, kTileN = kMmaN, kTileK = 128;  // kTileK: the elements of a scale
constexpr int kStages = 5;  // as many as fit into shared memory
constexpr int kGroup = 8;   // tiles of a column of the order in which tiles are computed; see tile_at
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last warpgroup is the producer's
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;  // setmaxnreg moves them from the former to the latter
constexpr int kScalesOf128 = 4;  // copied for a 128 × 128 block, of which one is used: TMA copies 16 bytes from a multiple of them
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

struct Shared {
  uint8_t a[kStages][kTileM * kTileK], b[kStages][kTileN * kTileK];
  float a_scale_inv[kStages][kTileM], b_scale_inv[kStages][kTileN];
  Barrier full[kStages], empty[kStages];
};
constexpr int kAlignment = kSwizzle * kSwizzleRows;
constexpr int kSharedBytes = sizeof(Shared) + kAlignment;  // dynamic shared memory is aligned to less
static_assert(kSharedBytes <= 227 * 1024);  // what Hopper gives one block
static_assert(sizeof(Shared::a[0]) % kAlignment == 0 && sizeof(Shared::b[0]) % kAlignment == 0);

struct Matmul {
  TensorMap a, b, a_scale_inv, b_scale_inv;
  void* out;
  int m, n, tiles_m, tiles_n, blocks_k, accumulate;
};

struct Tile {
  int m, n;
};

// Tile `index` in the order of computation: down kGroup tiles, then on to the next column of them, so that blocks which run
// at the same time read the same parts of A and B from L2.
__host__ __device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int group = index / (kGroup * tiles_n), within = index % (kGroup * tiles_n), above = group * kGroup;
  const int height = tiles_m - above < kGroup ? tiles_m - above : kGroup;
  return {above + within % height, within / height};
}

// A thread's position in the ring of stages, and the parity of the phase that its barriers are in.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The producer: for each tile and each 128 elements along k, waits for an empty stage and fills it. kB1x128: B is scaled in
// blocks of 1 × 128, else of 128 × 128.
template <bool kB1x128>
__device__ void produce(const Matmul& p, Shared& shared) {
  constexpr int kBScales = kB1x128 ? kTileN : kScalesOf128;
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
      if (kB1x128) copy(p.b_scale_inv, shared.b_scale_inv[ring.stage], full, k, tile.n * kTileN);
      if (!kB1x128) copy(p.b_scale_inv, shared.b_scale_inv[ring.stage], full, tile.n, k / kScalesOf128 * kScalesOf128);
    }
  }
}

// total += partial · scales. The scales of A start at the warpgroup's first row; those of B at the tile's first column, or
// at the scale of the 128 × 128 block.
template <bool kB1x128>
__device__ __forceinline__ void promote(
    float (&total)[kFragment], const float (&partial)[kFragment], const float* a_scale_inv, const float* b_scale_inv,
    int thread) {
  const float of_row[2] = {
      read_copied<1>(a_scale_inv + fragment_row(thread, 0)).at[0],
      read_copied<1>(a_scale_inv + fragment_row(thread, 2)).at[0]};
  const float of_b = kB1x128 ? 0.0f : read_copied<1>(b_scale_inv).at[0];
  const float of_block[2] = {of_row[0] * of_b, of_row[1] * of_b};
#pragma unroll
  for (int i = 0; i < kFragment; i += 4) {
    const Vec<float, 2> of_column =
        kB1x128 ? read_copied<2>(b_scale_inv + fragment_column(thread, i)) : Vec<float, 2>{};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      total[i + j] += partial[i + j] * (kB1x128 ? of_row[j / 2] * of_column.at[j % 2] : of_block[j / 2]);
  }
}

// Stores a warpgroup's part of the tile, which starts at (first_row, first_column), in fp32: the four lanes of a quad write
// 32 adjacent bytes. With `accumulate`, all loads are issued before the first store.
__device__ __forceinline__ void store_tile(
    const Matmul& p, float* out, float (&total)[kFragment], int first_row, int first_column, int thread) {
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

// Transposes 4 × 4 words over a quad: lane q gets word q of each of the four lanes, in their order.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
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

// The same in bf16: the lanes of a quad exchange their pairs of columns, so that each stores 8 adjacent ones, and the quad
// 64 bytes.
__device__ __forceinline__ void store_tile(
    const Matmul& p, __nv_bfloat16* out, float (&total)[kFragment], int first_row, int first_column, int thread) {
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
      transpose_quad(words.at, thread);
      const int column = first_column + 2 * first + thread % 4 * 8;
      if (row < p.m && column < p.n) store(reinterpret_cast<uint32_t*>(out + int64_t(row) * p.n + column), words);
    }
  }
}

// A consumer warpgroup: for each tile, multiplies the stages that the producer fills and promotes their sums to fp32.
template <typename T, bool kB1x128>
__device__ void consume(const Matmul& p, Shared& shared) {
  const int thread = threadIdx.x % kWarpgroup;
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);  // so the compiler knows that it is uniform
  Ring ring;
  for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
    float total[kFragment] = {}, partial[kFragment];
    for (int k = 0; k < p.blocks_k; ++k, ring.next()) {
      wait(shared.full[ring.stage], ring.parity);
      const uint64_t a = descriptor(shared_address(shared.a[ring.stage] + group * kMmaM * kTileK));
      const uint64_t b = descriptor(shared_address(shared.b[ring.stage]));
      begin_mma(partial);
#pragma unroll
      for (int at = 0; at < kTileK; at += kMmaK) mma(partial, advance(a, at), advance(b, at), at > 0);
      commit_mma();
      wait_mma(partial);
      const float* const a_scale_inv = shared.a_scale_inv[ring.stage] + group * kMmaM;
      const float* const b_scale_inv = shared.b_scale_inv[ring.stage] + (kB1x128 ? 0 : k % kScalesOf128);
      promote<kB1x128>(total, partial, a_scale_inv, b_scale_inv, thread);
      fence_reads();
      __syncwarp();  // all lanes have read the scales: the stage is empty
      if (thread % kWarp == 0) arrive(shared.empty[ring.stage]);
    }
    const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
    store_tile(p, static_cast<T*>(p.out), total, tile.m * kTileM + group * kMmaM, tile.n * kTileN, thread);
  }
}

template <typename T, bool kB1x128>
__global__ void __launch_bounds__(kThreads, 1) fp8_matmul(const __grid_constant__ Matmul p) {
  if (!hopper::kCompiledFor) return;
  // Barriers: a stage is full when the producer has announced its bytes and TMA has copied them; it is empty when every
  // consumer warp has read it.
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
    claim_registers<kConsumerRegisters>();
    consume<T, kB1x128>(p, shared);
  } else {
    release_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce<kB1x128>(p, shared);
  }
}

template <typename T, bool kB1x128>
int launch(const Matmul& p, int device, void* stream) {
  const auto kernel = fp8_matmul<T, kB1x128>;
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
  const bool b_1x128 = x.b_scaling == TRIAXIS_BLOCK_1X128;
  const int64_t blocks_k = ceil_div(x.k, kTileK), blocks_n = ceil_div(x.n, kTileN);
  Matmul p{};
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
    failed = b_1x128 ? make_tensor_map(p.b_scale_inv, x.b_scale_inv, blocks_k, x.n, 1, kTileN)
                    : make_tensor_map(p.b_scale_inv, x.b_scale_inv, blocks_n, ceil_div(blocks_k, 4) * 4, 1, kScalesOf128);
  if (failed != 0) return failed;
  if (x.out_dtype == TRIAXIS_F32)
    return b_1x128 ? launch<float, true>(p, device, stream) : launch<float, false>(p, device, stream);
  return b_1x128 ? launch<__nv_bfloat16, true>(p, device, stream) : launch<__nv_bfloat16, false>(p, device, stream);
}
