// Vectors of four floats in plain C++: any machine.

struct Narrow {
  Ints total;
};

constexpr int room(int bits) { return 1 << 20; }

// The sum of the products of the bytes of u, unsigned or signed, and those of x, signed.
INLINE Ints dot_four(Ints total, Uints u, Ints x, bool is_signed) {
#pragma GCC unroll 4
  for (int shift = 0; shift < 32; shift += 8) {
    Ints top = (Ints)(u << (24 - shift));
    total += (is_signed ? top >> 24 : (Ints)((Uints)top >> 24)) * ((x << (24 - shift)) >> 24);
  }
  return total;
}

INLINE Narrow dot(Narrow sum, Uints u, Ints x) { return {dot_four(sum.total, u, x, false)}; }

INLINE Ints widened(Ints total, Narrow sum) { return total + sum.total; }

INLINE Ints dot_signed(Ints total, Uints w, Ints x) { return dot_four(total, w, x, true); }

INLINE Uints look_up(const uint8_t* table, Uints bytes) {
  uint8_t index[4 * LANES];
  std::memcpy(index, &bytes, sizeof bytes);
  for (int i = 0; i < 4 * LANES; ++i) index[i] = table[index[i] & 15];
  std::memcpy(&bytes, index, sizeof bytes);
  return bytes;
}

INLINE Floats pick(const float* table, Uints i) {
  return Floats{table[i[0] & 15], table[i[1] & 15], table[i[2] & 15], table[i[3] & 15]};
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

INLINE float total(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// Exact for all finite halves, infinities and NaN: a half's bits, moved, are 2^-112 times it. Where
// these would be a subnormal float, which XLA's threads take for zero, the half is an integer.
INLINE Floats from_halves(const uint16_t* p) {
  Uints h = {p[0], p[1], p[2], p[3]};
  Uints moved = (h & 0x7fff) << 13;
  Uints special = (Uints)((h & 0x7c00) == 0x7c00), small = (Uints)((h & 0x7c00) == 0);
  Uints magnitude = (Uints)((Floats)moved * 0x1p112f);
  Uints tiny = (Uints)(to_floats((Ints)(h & 0x3ff)) * 0x1p-24f);
  Uints bits = (special & (moved | 0x7f800000)) | (small & tiny) | (~(special | small) & magnitude);
  return (Floats)(bits | (h & 0x8000) << 16);
}

INLINE Ints byte_sums(Uints v) {
  v = (v & 0x00ff00ff) + ((v >> 8) & 0x00ff00ff);
  return (Ints)((v + (v >> 16)) & 0xffff);
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
