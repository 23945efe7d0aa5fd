// Vectors of four floats: NEON; with DOTPROD defined, the sdot instructions of ARMv8.2 too.

#ifdef DOTPROD
struct Narrow {
  int32x4_t total;
};

constexpr int room(int bits) { return 1 << 20; }

// The bytes of u are below 128, and so their own signed values.
INLINE Narrow dot(Narrow sum, Uints u, Ints x) {
  return {vdotq_s32(sum.total, (int8x16_t)u, (int8x16_t)x)};
}

INLINE Ints widened(Ints total, Narrow sum) { return total + (Ints)sum.total; }

INLINE Ints dot_signed(Ints total, Uints w, Ints x) {
  return (Ints)vdotq_s32((int32x4_t)total, (int8x16_t)w, (int8x16_t)x);
}

INLINE Ints byte_sums(Uints v) {
  return (Ints)vdotq_u32(vdupq_n_u32(0), (uint8x16_t)v, vdupq_n_u8(1));
}
#else
struct Narrow {
  Ints total;
};

constexpr int room(int bits) { return 1 << 20; }

INLINE Ints dot_signed(Ints total, Uints w, Ints x) {
  int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
  int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
  return total + (Ints)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

INLINE Narrow dot(Narrow sum, Uints u, Ints x) { return {dot_signed(sum.total, u, x)}; }

INLINE Ints widened(Ints total, Narrow sum) { return total + sum.total; }

INLINE Ints byte_sums(Uints v) { return (Ints)vpaddlq_u16(vpaddlq_u8((uint8x16_t)v)); }
#endif

INLINE Uints look_up(const uint8_t* table, Uints bytes) {
  return (Uints)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)bytes);
}

// The bytes 4 i to 4 i + 3 of the table's 64.
INLINE Floats pick(const float* table, Uints i) {
  Uints bytes = (i & 15) * 0x04040404 + 0x03020100;
  uint8x16x4_t all = vld1q_u8_x4((const uint8_t*)table);
  return (Floats)vqtbl4q_u8(all, (uint8x16_t)bytes);
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

INLINE float total(Floats v) { return vaddvq_f32((float32x4_t)v); }

INLINE Floats from_halves(const uint16_t* p) {
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

// total + the sum of the four bytes of each word times x, which stands in all bytes of its word.
INLINE Ints multiply_byte_sums(Ints total, Uints v, Ints x) {
  return total + byte_sums(v) * ((x << 24) >> 24);
}

// Byte i of each word, in all of its bytes.
INLINE Uints repeat_byte(Uints v, int i) { return (v >> (8 * i) & 255) * 0x01010101; }

// table[bytes[4 i]] in lane i.
INLINE Uints at(const uint32_t* table, const uint8_t* bytes) {
  return Uints{table[bytes[0]], table[bytes[4]], table[bytes[8]], table[bytes[12]]};
}
