// Products with bfloat16 planes for AVX-512 with VBMI; all else is as for AVX-512 with VNNI.
//
// Bytes of a vector are four successive rows of sixteen columns, a word each, as `rest` has them:
// 64 weights at a time. One instruction takes four codes out of each word, and one more the bits of
// `near` for what of them is an escape: the bits already used, and 3 for each escape before in the
// same word, are what to skip.
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
  Vector sign, rest, high;
};

INLINE Constants constants(int top) {
  return {bytes(top), bytes(1), bytes(7), bytes(3), _mm512_set1_epi32(0x01010100),
          _mm512_set1_epi64(0x2020202000000000), bytes(128), bytes(127),
          _mm512_set1_epi32(static_cast<int>(0xffff0000))};
}

template <int R>
struct Sums {
  __m512 of[R][4];  // of even and of odd rows, in the lower and the upper half of a lane's columns
};

// 64 weights from bytes of exponents and rests, times x.
template <int R>
INLINE void add(const Constants& k, Vector exponent, Vector rest, const float* x, Sums<R>& sums) {
  const Vector high =
      _mm512_ternarylogic_epi32(k.sign, rest, _mm512_srli_epi16(exponent, 1), 0xCA);
  const Vector low = _mm512_ternarylogic_epi32(k.rest, rest, _mm512_slli_epi16(exponent, 7), 0xCA);
  const Vector a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
  const __m512 even[] = {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                         _mm512_castsi512_ps(_mm512_slli_epi32(b, 16))};
  const __m512 odd[] = {_mm512_castsi512_ps(_mm512_and_si512(a, k.high)),
                        _mm512_castsi512_ps(_mm512_and_si512(b, k.high))};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const auto* two = reinterpret_cast<const double*>(x + r * kBlockRows);
    const __m512 x0 = _mm512_castpd_ps(_mm512_set1_pd(two[0]));
    const __m512 x1 = _mm512_castpd_ps(_mm512_set1_pd(two[1]));
    sums.of[r][0] = _mm512_fmadd_ps(even[0], x0, sums.of[r][0]);
    sums.of[r][1] = _mm512_fmadd_ps(even[1], x0, sums.of[r][1]);
    sums.of[r][2] = _mm512_fmadd_ps(odd[0], x1, sums.of[r][2]);
    sums.of[r][3] = _mm512_fmadd_ps(odd[1], x1, sums.of[r][3]);
  }
}

// Sixteen columns of a block of rows.
template <int Bits, int R, bool Whole>
struct Block {
  static constexpr int kWords = Bits;  // of codes, for 32 rows
  static constexpr int kTop = (1 << Bits) - 1;

  Constants k;
  const FloatPlanes& w;
  const uint32_t *codes, *rest;  // of its first row and column
  int64_t rows;
  __mmask16 columns;
  const float* x;
  uint8_t* exponents;  // [32, 64]
  Vector base, under, near, used;
  Sums<R> sums;

  // A word that is there, or zeros.
  INLINE Vector read(const uint32_t* from, int64_t row, int64_t count) const {
    const __mmask16 mask = Whole || row < count ? columns : 0;
    if (Whole) _mm_prefetch(from + (row + count) * w.n, _MM_HINT_T0);
    return _mm512_maskz_loadu_epi32(mask, from + row * w.n);
  }

  template <int Low>
  INLINE void four(int64_t group, Vector words) {
    const Vector code = _mm512_and_si512(
        _mm512_multishift_epi64_epi8(places(Low, Bits), words), k.top);
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
      _mm512_store_si512(exponents + group * 64, exponent);
    } else {
      const __mmask64 inside = _mm512_cmpneq_epi8_mask(code, k.top);
      exponent = _mm512_maskz_add_epi8(inside, code, base);
      own = _mm512_maskz_mov_epi8(inside, own);
    }
    add<R>(k, exponent, own, x + group * 4, sums);
  }

  // Rows 32 i to 32 i + 31.
  INLINE void run(int64_t i) {
    const int64_t count = Whole ? 4 * kWords
                          : Bits == 3 ? (rows + 31) / 32 * 3 : (rows + 7) / 8;
    Vector c[kWords];
#pragma GCC unroll 4
    for (int j = 0; j < kWords; ++j) c[j] = read(codes, kWords * i + j, count);
    const int64_t g = 8 * i;
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

  INLINE void add_to(float* y) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, y += w.n) {
      const __m512 a = _mm512_add_ps(sums.of[r][0], sums.of[r][2]);
      const __m512 b = _mm512_add_ps(sums.of[r][1], sums.of[r][3]);
      const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
      _mm512_mask_storeu_ps(y, columns, _mm512_add_ps(all, _mm512_maskz_loadu_ps(columns, y)));
    }
  }
};

INLINE float value(uint32_t exponent, uint32_t rest) {
  const uint32_t bits = (rest >> 7) << 31 | exponent << 23 | (rest & 127) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// What listed weights of one column in a block of rows lack; `c` counts from the first column.
template <int Bits, int R>
INLINE void correct(const FloatProduct& a, int64_t block, int64_t c, const uint8_t* exponents) {
  const FloatPlanes& w = *a.planes;
  const int64_t column = a.first + c, begin = block * kBlockRows;
  do {
    const int64_t row = a.next[c], in = row - begin;
    if (in >= 0) {
      const uint32_t rest = w.rest[row / 4 * w.n + column] >> (row % 4 * 8) & 255;
      float lack = value(w.exponent[a.at[c]], rest);
      if (Bits == 3) lack -= value(exponents[in / 4 * 64 + c % 16 * 4 + in % 4], rest);
      const int64_t place = (in & ~3) | (in & 1) << 1 | (in >> 1 & 1);
      const float* x = a.x + block * a.m * kBlockRows + place;
      for (int r = 0; r < R; ++r) a.y[r * w.n + column] += x[r * kBlockRows] * lack;
    }
    const int32_t i = ++a.at[c];
    const int64_t next = i < a.end[c] ? w.where[i] - column * w.k : INT32_MAX;
    a.next[c] = next < w.k ? static_cast<int32_t>(next) : INT32_MAX;
  } while (a.next[c] < begin + kBlockRows);
}

template <int Bits, int R, bool Whole>
TARGET void block_of(const FloatProduct& a, int64_t block) {
  const FloatPlanes& w = *a.planes;
  constexpr int64_t kCodes = kBlockRows * Bits / 32, kRests = kBlockRows / 4;
  const int64_t row = block * kBlockRows, end = a.first + a.count;
  alignas(64) uint8_t exponents[kBlockRows * 16];
  const Constants k = constants((1 << Bits) - 1);
  for (int64_t c = a.first; c < end; c += 16) {
    const auto columns = static_cast<__mmask16>(end - c < 16 ? (1 << (end - c)) - 1 : 0xffff);
    Block<Bits, R, Whole> b{k, w, w.codes + block * kCodes * w.n + c,
                            w.rest + block * kRests * w.n + c, w.k - row, columns,
                            a.x + block * R * kBlockRows, exponents};
    const __m128i base = _mm_maskz_loadu_epi8(columns, w.base + c);
    b.base = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(base), k.ones);
    b.under = _mm512_sub_epi8(b.base, k.ones);
    b.used = _mm512_setzero_si512();
    if constexpr (Bits == 3) {
      if (Whole) _mm_prefetch(w.near + (block + 1) * w.n + c, _MM_HINT_T0);
      b.near = _mm512_and_si512(_mm512_maskz_loadu_epi32(columns, w.near + block * w.n + c),
                                _mm512_set1_epi32(0x3fffffff));
    }
    std::memset(&b.sums, 0, sizeof b.sums);
    for (int64_t i = 0; Whole ? i < 4 : 32 * i < b.rows; ++i) b.run(i);
    b.add_to(a.y + c);
    const Vector next = _mm512_loadu_si512(a.next + (c - a.first));
    const auto last = _mm512_set1_epi32(static_cast<int>(row + kBlockRows));
    uint32_t listed = _mm512_cmplt_epi32_mask(next, last) & columns;
    for (; listed; listed &= listed - 1)
      correct<Bits, R>(a, block, c - a.first + __builtin_ctz(listed), exponents);
  }
}

template <int Bits, int R>
TARGET void blocks(const FloatProduct& a) {
  const int64_t whole = a.planes->k / kBlockRows;
  for (int64_t block = 0; block < whole; ++block) block_of<Bits, R, true>(a, block);
  if (a.planes->k % kBlockRows) block_of<Bits, R, false>(a, whole);
}

template <int Bits>
void product(const FloatProduct& a) {
  switch (a.m) {
    case 1: return blocks<Bits, 1>(a);
    case 2: return blocks<Bits, 2>(a);
    case 3: return blocks<Bits, 3>(a);
    case 4: return blocks<Bits, 4>(a);
  }
}

void float_product(const FloatProduct& a) { a.planes->bits == 3 ? product<3>(a) : product<4>(a); }

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
