// One step of the Viterbi search on vectors of LANES floats. viterbi.cc includes this file once
// for each instruction set, with NAMESPACE, LANES and TARGET (a function attribute) defined.

namespace NAMESPACE {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#define INLINE TARGET __attribute__((always_inline)) static inline

INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int B, int... lane>
INLINE Floats repeat(Floats v, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (lane >> B)...);
#else
  return __builtin_shuffle(v, Ints{(lane >> B)...});
#endif
}

// p[lane >> B]: 2^B successive states come from one node. Reads LANES floats at p.
template <int B>
INLINE Floats spread(const float* p) {
  if constexpr ((1 << B) >= LANES) {
    return Floats{} + *p;
  } else {
    return repeat<B>(load(p), std::make_integer_sequence<int, LANES>());
  }
}

// out[j] = min over d of cost[s >> B] + |g(s) - x|^2, s = d * nodes + j. The low B bits of the
// float give way to d, so that one integer minimum finds the value and its argument.
// g is in the order of use: `arrange` in viterbi.cc.
template <int B, int V>
TARGET void step(const float* cost, float* __restrict out, uint8_t* __restrict back,
                 const float* g, const float* x, int64_t nodes) {
  constexpr int kBranches = 1 << B;
  for (int64_t j = 0; j < nodes; j += LANES) {
    Ints best = Ints{} + INT32_MAX;
#pragma GCC unroll 16
    for (int d = 0; d < kBranches; ++d) {
      Floats c = spread<B>(cost + ((d * nodes + j) >> B));
      for (int v = 0; v < V; ++v, g += LANES) {
        Floats e = load(g) - x[v];
        c += e * e;
      }
      Ints key = ((Ints)c & ~(kBranches - 1)) | d;
      best = key < best ? key : best;
    }
    std::memcpy(out + j, &best, sizeof best);
  }
  if (back == nullptr) return;
  for (int64_t j = 0; j < nodes; ++j) {
    int32_t key;
    std::memcpy(&key, out + j, sizeof key);
    back[j] = static_cast<uint8_t>(key & (kBranches - 1));
  }
}

// Subtract the least cost from all, so that what separates paths keeps its digits.
TARGET inline void settle(float* cost, int64_t nodes) {
  int32_t least = INT32_MAX;  // costs are not negative: their order is that of their bits
  for (int64_t j = 0; j < nodes; ++j) {
    int32_t bits;
    std::memcpy(&bits, cost + j, sizeof bits);
    least = bits < least ? bits : least;
  }
  float low;
  std::memcpy(&low, &least, sizeof low);
  for (int64_t j = 0; j < nodes; ++j) cost[j] -= low;
}

template <int V>
Kernel kernel(int K) {
  switch (K * V) {
#define CASE(B) \
  case B:       \
    if constexpr (B % V == 0) return {LANES, step<B, V>, settle};
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
  return {};
}

#undef INLINE

}  // namespace NAMESPACE
