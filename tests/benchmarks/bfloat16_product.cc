// What float planes are measured against: a product with plain bfloat16, and reading alone.
//
// Words hold rows 2 i and 2 i + 1 of a column, in order down the column, as packed codes do; threads
// and instructions are those of the native kernels, whose shared object this is linked with.

#include <algorithm>
#include <cstring>
#include <new>

#include "calls.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,fma")))
#endif

namespace jaxquant {
namespace {

// For several rows of x: the weights as floats, as other formats have them.
class Words16 : public Operand {
 public:
  const uint32_t* words_of;
  int64_t n;

  Words16() { form = kFloat32, scales = {&kOne, kSingle, true}; }

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    for (int64_t i = s.begin; i < s.end; ++i) {
      const uint32_t* from = words_of + i / 2 * n + first;
      uint32_t* to = room + (i - s.begin) * columns;
      if (i % 2) {
        for (int64_t c = 0; c < count; ++c) to[c] = from[c] & 0xffff0000;
      } else {
        for (int64_t c = 0; c < count; ++c) to[c] = from[c] << 16;
      }
    }
    return {room, columns};
  }

 private:
  static constexpr float kOne = 1;
};

#ifdef WIDE
// y += x @ w for `rows` rows and some columns, 64 of them at a time, asking for the next rows.
WIDE void add_rows(const uint32_t* w, int64_t n, int64_t first, int64_t count, int rows,
                   const float* x, float* y) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t c = first; c < first + count; c += 64) {
    __m512 sum[4] = {};
    for (int i = 0; i < rows / 2; ++i) {
      const uint32_t* from = w + i * n + c;
      const __m512 x0 = _mm512_set1_ps(x[2 * i]), x1 = _mm512_set1_ps(x[2 * i + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm_prefetch(from + rows / 2 * n + 16 * j, _MM_HINT_T0);
        const __m512i v = _mm512_loadu_si512(from + 16 * j);
        sum[j] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), x0, sum[j]);
        sum[j] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(v, high)), x1, sum[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      _mm512_storeu_ps(y + c + 16 * j, _mm512_add_ps(sum[j], _mm512_loadu_ps(y + c + 16 * j)));
  }
}

// n a multiple of 64, k of `rows`.
void one_row(int threads, const uint32_t* w, int64_t k, int64_t n, int rows, int64_t most,
             const float* x, float* y) {
  const int64_t parts = (n + threads * most - 1) / (threads * most) * threads;
  const int64_t share = ((n + parts - 1) / parts + 63) / 64 * 64;
  Team::the().share(threads - 1, true, (n + share - 1) / share, [&](int, int64_t i) {
    const int64_t first = i * share, count = std::min(share, n - first);
    std::fill_n(y + first, count, 0.0f);
    for (int64_t row = 0; row < k; row += rows)
      add_rows(w + row / 2 * n, n, first, count, rows, x + row, y);
  });
}

WIDE uint32_t total(const uint32_t* from, int64_t count) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 64 <= count; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(from + i + 512 + 16 * j, _MM_HINT_T0);
      sum[j] = _mm512_add_epi32(sum[j], _mm512_loadu_si512(from + i + 16 * j));
    }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]),
                                                  _mm512_add_epi32(sum[2], sum[3])));
}
#else
uint32_t total(const uint32_t* from, int64_t count) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += from[i];
  return sum;
}
#endif

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> w,
                   ffi::ResultBuffer<ffi::F32> y, int32_t rows, int32_t most) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[1];
  const auto* words = reinterpret_cast<const uint32_t*>(w.typed_data());
#ifdef WIDE
  if (m == 1 && n % 64 == 0 && k % rows == 0 && __builtin_cpu_supports("avx512f")) {
    one_row(pool.num_threads(), words, k, n, rows, most, x.typed_data(), y->typed_data());
    return ffi::Error::Success();
  }
#endif
  Words16 operand;
  operand.words_of = words, operand.n = n;
  multiply(pool.num_threads(), choose(-1), {m, k, k, 128, 256, kAsFloat},
           {{{&operand}, y->typed_data(), n, 1, x.typed_data()}});
  return ffi::Error::Success();
}

ffi::Error read(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> w, ffi::ResultBuffer<ffi::S32> sums) {
  const int64_t threads = pool.num_threads(), count = w.element_count();
  std::atomic<uint32_t> all{0};
  Team::the().share(static_cast<int>(threads) - 1, true, threads, [&](int, int64_t i) {
    const int64_t first = count / threads * i;
    all += total(reinterpret_cast<const uint32_t*>(w.typed_data()) + first, count / threads);
  });
  sums->typed_data()[0] = static_cast<int32_t>(all);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16_product, jaxquant::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("rows")
                                  .Attr<int32_t>("most"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16_read, jaxquant::read,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());
