// The scheduler of the emulation: fibers, warps, blocks, launches.

#include "cuda.h"

namespace emulation {

State& state() {
  static State only;
  return only;
}

void seed(uint64_t value) { state().random.seed(value); }

// Returns to the scheduler until it resumes this fiber.
void wait(Wait reason) {
  State& s = state();
  Fiber* const self = s.current;
  self->wait = reason;
  if (_setjmp(self->resume) == 0) _longjmp(s.scheduler, 1);
}

void wait_until(const std::function<bool()>& happened) {
  Fiber* const self = state().current;
  for (self->polling = true; !happened();) wait(Wait::event);
  self->polling = false;
  state().progress = true;
}

void fail(const std::string& reason) {
  const uint3 at = threadIdx;
  state().failure = "thread " + std::to_string(at.x) + " of block " + std::to_string(blockIdx.x) + ": " + reason;
  wait(Wait::done);  // never resumed
}

std::vector<const Fiber*> lanes_of_warp() {
  const State& s = state();
  std::vector<const Fiber*> lanes;
  const int first = s.current_index / 32 * 32;
  for (int i = first; i < std::min(first + 32, s.threads); ++i) lanes.push_back(s.fibers[size_t(i)].get());
  return lanes;
}

namespace {

void fiber_main() {
  for (;;) {
    state().kernel();
    wait(Wait::done);  // resumed for the next block
  }
}

Fiber& fiber(State& s, int index) {
  while (int(s.fibers.size()) <= index) {
    auto made = std::make_unique<Fiber>();
    getcontext(&made->entry);
    made->entry.uc_stack.ss_sp = made->stack.get();
    made->entry.uc_stack.ss_size = Fiber::stack_bytes;
    made->entry.uc_link = nullptr;
    makecontext(&made->entry, fiber_main, 0);
    s.fibers.push_back(std::move(made));
  }
  return *s.fibers[index];
}

void resume(State& s, int index) {
  Fiber& next = *s.fibers[index];
  s.current = &next;
  s.current_index = index;
  s.progress |= !next.polling;
  threadIdx = next.index;
  if (_setjmp(s.scheduler) == 0) {
    if (next.entered) _longjmp(next.resume, 1);
    next.entered = true;
    setcontext(&next.entry);
  }
}

// Their stacks are inside a kernel, so that no fiber can be used again.
[[noreturn]] void stop(State& s, const std::string& reason) {
  s.fibers.clear();
  s.failure.clear();
  throw std::runtime_error(reason);
}

// Runs the lanes of a warp until each waits for the block, polls an event, or is done.
void run_warp(State& s, int warp) {
  for (bool again = true; again;) {
    again = false;
    for (int i = warp * 32; i < std::min(warp * 32 + 32, s.threads); ++i) {
      if (s.fibers[i]->wait != Wait::none) continue;
      resume(s, i);
      if (!s.failure.empty()) stop(s, std::string(s.failure));
      again = true;
    }
  }
}

std::string stuck(const State& s) {
  for (int i = 0; i < s.threads; ++i)
    if (s.fibers[i]->wait == Wait::warp)
      return "deadlock: thread " + std::to_string(i) + " waits for lanes of its warp that never come";
  return "deadlock: threads wait for an event that no other thread causes";
}

void run_block(State& s) {
  std::vector<int> order(size_t(s.threads + 31) / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  s.warps.assign(order.size(), Warp{});
  std::fill(s.shared.begin(), s.shared.end(), 0xCD);
  for (int i = 0; i < s.threads; ++i) {
    Fiber& f = fiber(s, i);
    f.wait = Wait::none;
    f.polling = false;
    f.copies = f.fenced = 0;
    f.index = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y, unsigned(i) / blockDim.x / blockDim.y};
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), s.random);
    s.progress = false;
    for (const int warp : order) run_warp(s, warp);
    bool waiting = false, polling = false;
    for (int i = 0; i < s.threads; ++i) {
      polling |= s.fibers[i]->wait == Wait::event;
      if (s.fibers[i]->wait == Wait::warp || (polling && !s.progress)) {
        stop(s, stuck(s));
      }
      waiting |= s.fibers[i]->wait == Wait::block;
    }
    if (!waiting && !polling) return;
    const Wait over = polling ? Wait::event : Wait::block;
    for (int i = 0; i < s.threads; ++i)
      if (s.fibers[i]->wait == over) s.fibers[i]->wait = Wait::none;
  }
}

}  // namespace

uint64_t exchange(uint32_t mask, uint64_t value, int source_lane) {
  State& s = state();
  const int self = s.current_index, lane = self % 32, first = self - lane;
  Warp& warp = s.warps[size_t(self) / 32];
  const int lanes = std::min(32, s.threads - first);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  warp.sent[lane] = value;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) == mask) {
    warp.arrived &= ~mask;
    for (int i = 0; i < lanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      warp.received[i] = warp.sent[i];
      s.fibers[first + i]->wait = Wait::none;
    }
  } else {
    wait(Wait::warp);
  }
  return s.warps[size_t(self) / 32].received[source_lane];
}

int launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  State& s = state();
  const std::lock_guard<std::mutex> guard(s.one_launch);
  ++s.launches;
  s.kernel = std::move(kernel);
  s.threads = int(block.x * block.y * block.z);
  s.shared.resize(shared_bytes);
  blockDim = block;
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(s);
  return 0;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void triaxis_emulation_seed(uint64_t value) { emulation::seed(value); }
extern "C" __attribute__((visibility("default"))) uint64_t triaxis_emulation_launches() { return emulation::state().launches; }
