// Vectors of eight floats: AVX2 with FMA and F16C; with VNNI defined, AVX-VNNI too.

#ifdef VNNI
struct Narrow {
  __m256i total;
};

constexpr int room(int bits) { return 1 << 20; }

INLINE Narrow dot(Narrow sum, Uints u, Ints x) {
  return {_mm256_dpbusd_avx_epi32(sum.total, (__m256i)u, (__m256i)x)};
}

INLINE Ints widened(Ints total, Narrow sum) { return total + (Ints)sum.total; }
#else
struct Narrow {  // sums of products of bytes, until they may not fit 16 bits
  __m256i pairs;
};

// Products of bytes < 2^bits with int8 that a Narrow can add up.
constexpr int room(int bits) { return 32767 / (2 * 127 * ((1 << bits) - 1)); }

INLINE Narrow dot(Narrow sum, Uints u, Ints x) {
  return {_mm256_add_epi16(sum.pairs, _mm256_maddubs_epi16((__m256i)u, (__m256i)x))};
}

INLINE Ints widened(Ints total, Narrow sum) {
  return total + (Ints)_mm256_madd_epi16(sum.pairs, _mm256_set1_epi16(1));
}
#endif

// The sum of the products of signed bytes.
INLINE Ints dot_signed(Ints total, Uints w, Ints x) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w),
                                       _mm256_sign_epi8((__m256i)x, (__m256i)w));
  return total + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// table[each byte], bytes < 16.
INLINE Uints look_up(const uint8_t* table, Uints bytes) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (Uints)_mm256_shuffle_epi8(t, (__m256i)bytes);
}

// table[i & 15]
INLINE Floats pick(const float* table, Uints i) {
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)i);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)i, 28)));
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

INLINE Floats from_halves(const uint16_t* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}

// The sum of the four bytes of each word.
INLINE Ints byte_sums(Uints v) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)v, _mm256_set1_epi8(1));
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
