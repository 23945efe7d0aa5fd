// Tail-biting Viterbi search of the bit-shift trellis, one sequence of 256 weights at a time.
//
// A step has L-bit states s and B = K V new bits. A node is what two successive states share:
// the low L - B bits of one, the top L - B bits of the next. With costs kept on nodes,
//   cost'[j] = min over d < 2^B of cost[s >> B] + |g(s) - x|^2,   s = d * nodes + j,
// each state is looked at once, in order, and there is no gather. The d of the best path, in
// order, are the stream of bits. Sums and squares are not contracted (-ffp-contract=off), so
// every instruction set finds the same path.
//
// Built and loaded by pallas_kernels/cpu/native/__init__.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kWeights = 256;
constexpr float kFar = 1e30f;  // the cost of a node that no path may start from
constexpr int kSettle = 8;     // steps between two subtractions of the least cost

struct Kernel {
  int lanes = 0;  // 0: there is none
  void (*step)(const float*, float*, uint8_t*, const float*, const float*, int64_t) = nullptr;
  void (*settle)(float*, int64_t) = nullptr;
};

#if defined(__x86_64__)
#define NAMESPACE avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "step.h"
#undef NAMESPACE
#undef LANES
#undef TARGET
#define NAMESPACE avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#include "step.h"
#undef NAMESPACE
#undef LANES
#undef TARGET
#endif
#define NAMESPACE baseline
#define LANES 4
#define TARGET
#include "step.h"

// The widest kernel this machine has, of at most `lanes` lanes.
template <int V>
Kernel choose(int K, int lanes) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (lanes >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kernel<V>(K);
  if (lanes >= 8 && __builtin_cpu_supports("avx2")) return avx2::kernel<V>(K);
#endif
  return baseline::kernel<V>(K);
}

// Floats on a boundary of 64 bytes, zeros at first.
class Aligned {
 public:
  explicit Aligned(int64_t count = 0) : lines_((count + 15) / 16) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::vector<Line> lines_;
};

struct Search {
  int B, V, steps;
  int64_t nodes;
  Kernel kernel;
  const float* table;  // [states, V]
  Aligned arranged;    // the table in the order of use

  // Block of `lanes` nodes, branch d, component, lane.
  void arrange() {
    arranged = Aligned((nodes << B) * V);
    float* to = arranged.data();
    for (int64_t j = 0; j < nodes; j += kernel.lanes)
      for (int64_t d = 0; d < 1 << B; ++d)
        for (int v = 0; v < V; ++v)
          for (int u = 0; u < kernel.lanes; ++u) *to++ = table[(d * nodes + j + u) * V + v];
  }
};

// Memory of one thread.
struct Scratch {
  Aligned cost, next;
  std::unique_ptr<uint8_t[]> back;  // [steps, nodes]: the d that led to each node

  // A kernel reads up to `lanes` floats past the last cost, and uses none of them.
  explicit Scratch(const Search& s)
      : cost(s.nodes + 16), next(s.nodes + 16), back(new uint8_t[s.steps * s.nodes]) {}
};

// Steps first .. last - 1, counted around the circle.
void forward(const Search& s, Scratch& scratch, const float* x, int first, int last, bool record) {
  for (int t = first; t < last; ++t) {
    int at = (t + s.steps) % s.steps;
    uint8_t* back = record ? scratch.back.get() + (t - first) * s.nodes : nullptr;
    s.kernel.step(scratch.cost.data(), scratch.next.data(), back, s.arranged.data(), x + at * s.V,
                  s.nodes);
    std::swap(scratch.cost, scratch.next);
    if (t % kSettle == 0) s.kernel.settle(scratch.cost.data(), s.nodes);
  }
}

// The d of step t into its place: most significant first, or woven (pallas_kernels/codecs/wide_trellis.py).
void store(const Search& s, int t, uint32_t d, uint32_t* words) {
  int bit = t * s.B;
  if (s.V == 4 && 32 % s.B == 0) {
    int count = s.steps * s.B / 32;
    words[t % count] |= d << (t / count * s.B);
    return;
  }
  uint64_t two = static_cast<uint64_t>(d) << (64 - s.B - bit % 32);
  words[bit / 32] |= static_cast<uint32_t>(two >> 32);
  if (static_cast<uint32_t>(two)) words[bit / 32 + 1] |= static_cast<uint32_t>(two);
}

void encode(const Search& s, Scratch& scratch, const float* x, uint32_t* words, float* values) {
  auto state_before = [&](int t, int64_t node) {  // the state of step t that leads to the node
    return scratch.back[t * s.nodes + node] * s.nodes + node;
  };
  int half = s.steps / 2;
  std::fill_n(scratch.cost.data(), s.nodes, 0.0f);
  forward(s, scratch, x, -half, 0, false);
  forward(s, scratch, x, 0, half, true);
  float* cost = scratch.cost.data();
  int64_t node = std::min_element(cost, cost + s.nodes) - cost;
  for (int t = half - 1; t >= 0; --t) node = state_before(t, node) >> s.B;

  std::fill_n(cost, s.nodes, kFar);
  cost[node] = 0.0f;
  forward(s, scratch, x, 0, s.steps, true);
  for (int t = s.steps - 1; t >= 0; --t) {
    int64_t state = state_before(t, node);
    std::copy_n(s.table + state * s.V, s.V, values + t * s.V);
    store(s, t, static_cast<uint32_t>(state / s.nodes), words);
    node = state >> s.B;
  }
}

ffi::Error viterbi(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> table,
                   ffi::Buffer<ffi::PRED> valid, ffi::ResultBuffer<ffi::S32> words,
                   ffi::ResultBuffer<ffi::F32> values, int32_t L, int32_t K, int32_t V,
                   int32_t lanes) try {
  Search s;
  s.B = K * V, s.V = V, s.steps = kWeights / V, s.nodes = int64_t{1} << (L - s.B);
  s.kernel = V == 1 ? choose<1>(K, lanes) : V == 2 ? choose<2>(K, lanes) : choose<4>(K, lanes);
  if (!s.kernel.lanes || s.nodes % s.kernel.lanes)
    return ffi::Error::InvalidArgument("no native Viterbi for this L, K, V");
  const int64_t count = x.element_count() / kWeights;
  std::memset(words->untyped_data(), 0, words->size_bytes());
  std::memset(values->untyped_data(), 0, values->size_bytes());
  if (count == 0) return ffi::Error::Success();
  s.table = table.typed_data();
  s.arrange();
  int threads = static_cast<int>(std::max<int64_t>(1, std::min(pool.num_threads(), count)));
  std::vector<Scratch> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(s);
  auto* out = reinterpret_cast<uint32_t*>(words->typed_data());
  jaxquant::Team::the().share(threads - 1, true, count, [&](int thread, int64_t i) {
    if (!valid.typed_data()[i]) return;
    encode(s, scratch[thread], x.typed_data() + i * kWeights, out + i * 8 * K,
           values->typed_data() + i * kWeights);
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a Viterbi search");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_viterbi, viterbi,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("L")
                                  .Attr<int32_t>("K")
                                  .Attr<int32_t>("V")
                                  .Attr<int32_t>("lanes"));
