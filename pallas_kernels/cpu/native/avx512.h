// Vectors of sixteen floats: AVX-512 (F, BW, DQ, VL) with VNNI.

struct Narrow {
  __m512i total;
};

constexpr int room(int bits) { return 1 << 20; }

INLINE Narrow dot(Narrow sum, Uints u, Ints x) {
  return {_mm512_dpbusd_epi32(sum.total, (__m512i)u, (__m512i)x)};
}

INLINE Ints widened(Ints total, Narrow sum) { return total + (Ints)sum.total; }

// Bytes of w as unsigned ones, 128 larger; what that adds is taken off again.
INLINE Ints dot_signed(Ints total, Uints w, Ints x) {
  __m512i top = _mm512_set1_epi8(-128);
  __m512i sum = _mm512_dpbusd_epi32((__m512i)total, _mm512_xor_si512((__m512i)w, top), (__m512i)x);
  return (Ints)sum - (Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), top, (__m512i)x);
}

INLINE Uints look_up(const uint8_t* table, Uints bytes) {
  __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return (Uints)_mm512_shuffle_epi8(t, (__m512i)bytes);
}

INLINE Floats pick(const float* table, Uints i) {
  return (Floats)_mm512_permutexvar_ps((__m512i)i, _mm512_loadu_ps(table));
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

INLINE float total(Floats v) { return _mm512_reduce_add_ps((__m512)v); }

INLINE Floats from_halves(const uint16_t* p) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

// total + the sum of the four bytes of each word times x, which stands in all bytes of its word.
INLINE Ints multiply_byte_sums(Ints total, Uints v, Ints x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)v, (__m512i)x);
}

// Byte i of each word, in all of its bytes.
INLINE Uints repeat_byte(Uints v, int i) { return (v >> (8 * i) & 255) * 0x01010101; }

// table[bytes[4 i]] in lane i.
INLINE Uints at(const uint32_t* table, const uint8_t* bytes) {
  __m512i index = _mm512_and_si512(_mm512_loadu_si512(bytes), _mm512_set1_epi32(255));
  return (Uints)_mm512_i32gather_epi32(index, table, 4);
}
