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

INLINE float total(Floats v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE Floats from_halves(const uint16_t* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}

// total + the sum of the four bytes of each word times x, which stands in all bytes of its word.
#ifdef VNNI
INLINE Ints multiply_byte_sums(Ints total, Uints v, Ints x) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)v, (__m256i)x);
}
#else
INLINE Ints multiply_byte_sums(Ints total, Uints v, Ints x) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)v, _mm256_set1_epi8(1));
  return total + (Ints)_mm256_madd_epi16(pairs, _mm256_srai_epi16((__m256i)x, 8));
}
#endif

// Byte i of each word, in all of its bytes.
INLINE Uints repeat_byte(Uints v, int i) {
  Uints place = Uints{0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c};
  return (Uints)_mm256_shuffle_epi8((__m256i)v, (__m256i)(place + i * 0x01010101u));
}

// table[bytes[4 i]] in lane i: inserted one by one, which is faster here than a gather.
INLINE __m128i four_at(const uint32_t* table, const uint8_t* bytes) {
  __m128i v = _mm_cvtsi32_si128(table[bytes[0]]);
  v = _mm_insert_epi32(v, table[bytes[4]], 1);
  v = _mm_insert_epi32(v, table[bytes[8]], 2);
  return _mm_insert_epi32(v, table[bytes[12]], 3);
}

INLINE Uints at(const uint32_t* table, const uint8_t* bytes) {
  __m256i low = _mm256_castsi128_si256(four_at(table, bytes));
  return (Uints)_mm256_inserti128_si256(low, four_at(table, bytes + 16), 1);
}
