// Blocks of float planes, a row of LANES columns at a time: any type, any instruction set.

// As many of the words from here on as there are, and zeros.
INLINE Uints some(const uint32_t* p, int64_t left) {
  if (left >= LANES) return load<Uints>(p);
  Uints v = {};
  std::memcpy(&v, p, left * sizeof(uint32_t));
  return v;
}

// Number `row` of a stream of `width` bits down each column; n: from one row of words to the next.
INLINE Uints taken(const uint32_t* words, int64_t n, int64_t row, int width, int64_t left) {
  const int64_t bit = row * width, low = bit % 32;
  const uint32_t* from = words + bit / 32 * n;
  Uints v = some(from, left) >> (int)low;
  if (low + width > 32) v |= some(from + n, left) << (int)(32 - low);
  return v & ((1u << width) - 1);
}

INLINE Uints spread_bytes(const uint8_t* p, int64_t left) {
  uint32_t wide[LANES] = {};
  for (int i = 0; i < (left < LANES ? left : LANES); ++i) wide[i] = p[i];
  return load<Uints>(wide);
}

// Sign and mantissa of a row; a plane's words begin after those of the planes before it.
INLINE Uints rest_of(const FloatPlanes& w, const uint32_t* from, int64_t row, int64_t left) {
  Uints rest = {};
  for (int p = 0, low = 0; p < w.type.planes; low += w.type.widths[p++]) {
    const int width = w.type.widths[p];
    rest |= taken(from, w.n, row, width, left) << low;
    const int64_t run = width == 3 ? 32 : 32 / width, words = width == 3 ? 3 : 1;
    from += (w.k + run - 1) / run * words * w.n;
  }
  return rest;
}

template <int Bits>
INLINE void tile_of(const FloatTile& a) {
  const FloatPlanes& w = *a.planes;
  constexpr int kTop = (1 << Bits) - 1;
  const int mantissa = w.type.mantissa, sign = mantissa + w.type.exponent;
  for (int64_t c = 0; c < a.columns; c += LANES) {
    const int64_t column = a.column + c, left = a.columns - c;
    const Ints base = (Ints)spread_bytes(w.base + column, left);
    Uints near = {};
    if (Bits == 3) near = some(w.near + a.row / kBlockRows * w.n + column, left) & 0x3fffffff;
    for (int64_t i = 0; i < a.rows; ++i) {
      const Uints code = taken(w.codes + column, w.n, a.row + i, Bits, left);
      const Uints rest = rest_of(w, w.rest + column, a.row + i, left);
      const Ints escaped = (Ints)(code == kTop);
      Ints exponent = base - 1 - (Ints)(near & 7);
      exponent &= ~(exponent >> 31);
      if (Bits == 4) exponent = Ints{};
      exponent = (escaped & exponent) | (~escaped & (base + (Ints)code));
      if (Bits == 3) near = ((Uints)escaped & near >> 3) | (~(Uints)escaped & near);
      const Uints bits = rest >> mantissa << sign | (Uints)exponent << mantissa |
                         (rest & ((1u << mantissa) - 1));
      const Uints moved = bits << a.up;
      std::memcpy(a.out + i * a.stride + c, &moved,
                  (left < LANES ? left : LANES) * sizeof(uint32_t));
    }
  }
}

TARGET void float_tile(const FloatTile& a) {
  a.planes->bits == 3 ? tile_of<3>(a) : tile_of<4>(a);
}
