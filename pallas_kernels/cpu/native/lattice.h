// E8P codes to words of eight 4-bit integers (see e8p.cc), in registers or to memory.

// The nibbles of a row's magnitudes, looked up, and what its byte of signs adds, computed, since
// loads are what limits these products: 14 where a coordinate is negative, 1 for a shift upwards.
// Of 16-bit codes at two bytes of every word, the lower given; kTop is flipped in each nibble.
template <int kTop>
INLINE Uints lattice_words(const uint32_t* words, int byte, const uint32_t* rows) {
  constexpr uint8_t e = kTop, n = kTop ^ 14, E = e << 4, N = n << 4;
  static const uint8_t kEven[16] = {e, n, n, 0, n, 0, 0, 0, n};
  static const uint8_t kOdd[16] = {E, N, N, 0, N, 0, 0, 0, N};
  // By the parity of the signs: a shift upwards, or the first sign the other way.
  static const uint8_t kShift[16] = {17, 14, 14, 17, 14, 17, 17, 14, 14, 17, 17, 14, 17, 14, 14, 17};
  const Uints one = Uints{} + 0x08040201, low = Uints{} + 0x0f0f0f0f;
  Uints s = repeat_byte(load<Uints>(words), byte), high = s >> 4;
  Uints shift = look_up(kShift, (s ^ high) & low) & 0x1111111f;
  Uints signs = look_up(kEven, s & one) ^ look_up(kOdd, high & one) ^ shift;
  return at(rows, (const uint8_t*)words + byte + 1) ^ signs;
}

// Of the low (half 0) or high 16 bits of words.
TARGET void lattice(const uint32_t* words, int half, int64_t count, const uint32_t* rows,
                    const uint32_t* signs, uint32_t* to) {
  const uint8_t* bytes = (const uint8_t*)words + 2 * half;
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES)
    store(to + c, lattice_words<0>(words + c, 2 * half, rows));
  for (; c < count; ++c) to[c] = rows[bytes[4 * c + 1]] ^ signs[bytes[4 * c]];
}

// Products of one row of x, whose words need not be written to memory: two octets a unit.
template <bool kBytes>
struct Lattice {
  static constexpr Unit kUnit = kUnits[kLattice];
  static constexpr int kWords = 2;
  static constexpr int kOffset = Integer<4>::kOffset;

  template <int C>
  INLINE static void read(const Product& a, int64_t unit, int64_t column, Uints (&w)[C][2]) {
    Uints stored[C][1];
    Stored::read(a, unit, column, stored);
    const uint32_t* from = a.words + unit * a.stride + column;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        w[c][i] = lattice_words<kBytes ? kOffset : 0>(from + c * LANES, 2 * i, a.rows);
  }

  INLINE static void bytes(Uints (&)[2]) {}
  INLINE static Uints plane(const Uints (&w)[2], int p) {
    return (w[p / 2] >> (4 * (p % 2))) & 0x0f0f0f0f;
  }
  INLINE static Floats value(const Uints (&w)[2], int i, const Table*) {
    return to_floats((Ints)(w[i / 8] << (28 - 4 * (i % 8))) >> 28);
  }
};
