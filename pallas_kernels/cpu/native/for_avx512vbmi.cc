// Products with bfloat16 planes for AVX-512 with VBMI; all else is as for AVX-512 with VNNI.
//
// Bytes of a vector are four successive rows of sixteen columns, a word each, as `rest` has them:
// 64 weights at a time. One instruction takes four codes out of each word, and another the bits of
// `near` for those that are escapes: those before in the same word have 3 bits each before them,
// and bits that earlier words used are shifted out. 128 rows of 16 columns are decoded to the first
// cache, where what is listed is put right, and then meet all rows of x.
#if defined(__x86_64__)
#include <immintrin.h>

#include <climits>
#include <cstring>

#include "kernels.h"

#define TARGET                                                                               \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2," \
                        "bmi,f16c,fma")))
#define INLINE TARGET __attribute__((always_inline)) inline

namespace jaxquant {
namespace avx512vnni { extern const Kernels kernels; }

namespace avx512vbmi {
namespace {

using Vector = __m512i;

constexpr int64_t kAhead = 64;  // columns: four steps, which stay in the first cache

INLINE Vector bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }

// The places of four fields of `width` bits from bit `low` of each word on.
INLINE Vector places(int low, int width) {
  const int even = low * 0x01010101 + width * 0x03020100;
  return _mm512_set1_epi64(static_cast<int64_t>(even + 0x20202020u) << 32 | even);
}

// What is the same for all columns.
struct Constants {
  Vector top, ones, seven, three;
  Vector before;  // times bytes of a word: the sum of those below each
  Vector second;  // what a place in the second word of two has besides
  Vector sign, rest;
};

INLINE Constants constants(int top) {
  return {bytes(top), bytes(1), bytes(7), bytes(3), _mm512_set1_epi32(0x01010100),
          _mm512_set1_epi64(0x2020202000000000), bytes(128), bytes(127)};
}

// A block of 128 rows and 16 columns as bfloat16: of four rows, two vectors. Columns 4 i and 4 i + 1
// are in the lanes of the first, the next two in those of the second; of a column come first rows 0
// and 1, then 2 and 3.
struct alignas(64) Weights {
  uint16_t bits[kBlockRows * 16];

  static int64_t place(int64_t row, int64_t column) {
    return row / 4 * 64 + column / 2 % 2 * 32 + column / 4 * 8 + column % 2 * 4 + row % 4;
  }
};

// Decodes such a block, or the rows of it that there are. What is listed comes out as it may.
template <int Bits, bool Whole>
struct Decoder {
  const Constants& k;
  const FloatPlanes& w;
  const uint32_t *codes, *rest;  // of its first row and column
  int64_t rows;
  __mmask16 columns;
  uint16_t* to;
  Vector base, under, near, used;

  // A word that is there, or zeros.
  INLINE Vector read(const uint32_t* from, int64_t row, int64_t count) const {
    const __mmask16 mask = Whole || row < count ? columns : 0;
    if (Whole) _mm_prefetch(from + row * w.n + kAhead, _MM_HINT_T0);
    return _mm512_maskz_loadu_epi32(mask, from + row * w.n);
  }

  template <int Low>
  INLINE void four(int64_t group, Vector words) {
    const Vector code =
        _mm512_and_si512(_mm512_multishift_epi64_epi8(places(Low, Bits), words), k.top);
    Vector own = read(rest, group, Whole ? kBlockRows / 4 : (rows + 3) / 4);
    Vector exponent;
    if constexpr (Bits == 3) {
      const __mmask64 escaped = _mm512_cmpeq_epi8_mask(code, k.top);
      const Vector skip = _mm512_maskz_mov_epi8(escaped, k.three);
      const Vector at = _mm512_or_si512(_mm512_mullo_epi32(skip, k.before), k.second);
      const Vector left = _mm512_srlv_epi32(near, used);
      const Vector d = _mm512_and_si512(_mm512_multishift_epi64_epi8(at, left), k.seven);
      used = _mm512_dpbusd_epi32(used, skip, k.ones);
      exponent = _mm512_mask_sub_epi8(_mm512_add_epi8(code, base), escaped, under, d);
    } else {
      exponent = _mm512_maskz_add_epi8(_mm512_cmpneq_epi8_mask(code, k.top), code, base);
    }
    // Bytes of bfloat16: the sign and seven bits of the exponent; its last bit and the mantissa.
    const Vector high =
        _mm512_ternarylogic_epi32(k.sign, own, _mm512_srli_epi16(exponent, 1), 0xCA);
    const Vector low = _mm512_ternarylogic_epi32(k.rest, own, _mm512_slli_epi16(exponent, 7), 0xCA);
    _mm512_store_si512(to + group * 64, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(to + group * 64 + 32, _mm512_unpackhi_epi8(low, high));
  }

  // Rows 32 i to 32 i + 31.
  INLINE void run(int64_t i) {
    const int64_t count = Whole       ? 4 * Bits
                          : Bits == 3 ? (rows + 31) / 32 * 3
                                      : (rows + 7) / 8;
    const int64_t g = 8 * i;
    Vector c[Bits];
#pragma GCC unroll 4
    for (int j = 0; j < Bits; ++j) c[j] = read(codes, Bits * i + j, count);
    if constexpr (Bits == 3) {
      four<0>(g, c[0]);
      four<12>(g + 1, c[0]);
      four<0>(g + 2, _mm512_shrdi_epi32(c[0], c[1], 24));
      four<4>(g + 3, c[1]);
      four<16>(g + 4, c[1]);
      four<0>(g + 5, _mm512_shrdi_epi32(c[1], c[2], 28));
      four<8>(g + 6, c[2]);
      four<20>(g + 7, c[2]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        four<0>(g + 2 * j, c[j]);
        four<16>(g + 2 * j + 1, c[j]);
      }
    }
  }
};

// y += x @ weights for R rows.
template <int R>
INLINE void add(const Weights& weights, int64_t groups, __mmask16 columns, const float* x, float* y,
                int64_t stride) {
  const Vector high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 sums[R][4] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const Vector a = _mm512_load_si512(weights.bits + g * 64);
    const Vector b = _mm512_load_si512(weights.bits + g * 64 + 32);
    const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    const __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a, high));
    const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b, high));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      double even, odd;  // two floats each
      std::memcpy(&even, x + r * kBlockRows + g * 4, sizeof even);
      std::memcpy(&odd, x + r * kBlockRows + g * 4 + 2, sizeof odd);
      const __m512 x0 = _mm512_castpd_ps(_mm512_set1_pd(even));
      const __m512 x1 = _mm512_castpd_ps(_mm512_set1_pd(odd));
      sums[r][0] = _mm512_fmadd_ps(a0, x0, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(b0, x0, sums[r][1]);
      sums[r][2] = _mm512_fmadd_ps(a1, x1, sums[r][2]);
      sums[r][3] = _mm512_fmadd_ps(b1, x1, sums[r][3]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r, y += stride) {
    const __m512 a = _mm512_add_ps(sums[r][0], sums[r][2]);
    const __m512 b = _mm512_add_ps(sums[r][1], sums[r][3]);
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
    _mm512_mask_storeu_ps(y, columns, _mm512_add_ps(all, _mm512_maskz_loadu_ps(columns, y)));
  }
}

TARGET void add_all(const Weights& weights, int64_t groups, __mmask16 columns, int64_t m,
                    const float* x, float* y, int64_t stride) {
  for (; m >= 4; m -= 4, x += 4 * kBlockRows, y += 4 * stride)
    add<4>(weights, groups, columns, x, y, stride);
  switch (m) {
    case 1: return add<1>(weights, groups, columns, x, y, stride);
    case 2: return add<2>(weights, groups, columns, x, y, stride);
    case 3: return add<3>(weights, groups, columns, x, y, stride);
  }
}

// What is listed of one column in a block of rows; `c` counts from the first column.
inline void put_listed(const FloatProduct& a, int64_t block, int64_t c, Weights& to) {
  const FloatPlanes& w = *a.planes;
  const int64_t column = a.first + c, begin = block * kBlockRows;
  do {
    const int64_t row = a.next[c];
    if (row >= begin) {
      const uint32_t rest = w.rest[row / 4 * w.n + column] >> (row % 4 * 8) & 255;
      to.bits[Weights::place(row - begin, c % 16)] = static_cast<uint16_t>(
          (rest & 128) << 8 | w.exponent[a.at[c]] << 7 | (rest & 127));
    }
    const int32_t i = ++a.at[c];
    const int64_t next = i < a.end[c] ? w.where[i] - column * w.k : INT32_MAX;
    a.next[c] = next < w.k ? static_cast<int32_t>(next) : INT32_MAX;
  } while (a.next[c] < begin + kBlockRows);
}

template <int Bits, bool Whole>
TARGET void multiply_rows(const FloatProduct& a, int64_t block) {
  const FloatPlanes& w = *a.planes;
  constexpr int64_t kCodes = kBlockRows * Bits / 32, kRests = kBlockRows / 4;
  const int64_t row = block * kBlockRows, end = a.first + a.count;
  const Constants k = constants((1 << Bits) - 1);
  Weights weights;
  for (int64_t c = a.first; c < end; c += 16) {
    const auto columns = static_cast<__mmask16>(end - c < 16 ? (1 << (end - c)) - 1 : 0xffff);
    Decoder<Bits, Whole> d{k, w, w.codes + block * kCodes * w.n + c,
                           w.rest + block * kRests * w.n + c, w.k - row, columns, weights.bits};
    const __m128i base = _mm_maskz_loadu_epi8(columns, w.base + c);
    d.base = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(base), k.ones);
    d.under = _mm512_sub_epi8(d.base, k.ones);
    d.used = _mm512_setzero_si512();
    if constexpr (Bits == 3) {
      if (Whole) _mm_prefetch(w.near + (block + 1) * w.n + c, _MM_HINT_T0);
      d.near = _mm512_and_si512(_mm512_maskz_loadu_epi32(columns, w.near + block * w.n + c),
                                _mm512_set1_epi32(0x3fffffff));
    }
    const int64_t runs = Whole ? 4 : (d.rows + 31) / 32;
    for (int64_t i = 0; i < runs; ++i) d.run(i);
    const Vector next = _mm512_loadu_si512(a.next + (c - a.first));
    const Vector last = _mm512_set1_epi32(static_cast<int>(row + kBlockRows));
    uint32_t listed = _mm512_cmplt_epi32_mask(next, last) & columns;
    for (; listed; listed &= listed - 1)
      put_listed(a, block, c - a.first + __builtin_ctz(listed), weights);
    add_all(weights, 8 * runs, columns, a.m, a.x + block * a.m * kBlockRows, a.y + c, w.n);
  }
}

template <int Bits>
void multiply_all(const FloatProduct& a) {
  const int64_t whole = a.planes->k / kBlockRows;
  for (int64_t block = 0; block < whole; ++block) multiply_rows<Bits, true>(a, block);
  if (a.planes->k % kBlockRows) multiply_rows<Bits, false>(a, whole);
}

void float_product(const FloatProduct& a) {
  a.planes->bits == 3 ? multiply_all<3>(a) : multiply_all<4>(a);
}

Kernels with_products() {
  Kernels all = avx512vnni::kernels;
  all.name = "avx512vbmi";
  all.float_product = float_product;
  return all;
}

}  // namespace

extern const Kernels kernels = with_products();

}  // namespace avx512vbmi
}  // namespace jaxquant
#endif
