// Blocks of float planes, a vector of columns at a time: any type, any instruction set.

// As many of the words from here on as there are, and zeros.
INLINE Uints some(const uint32_t* p, int64_t left) {
  if (left >= LANES) return load<Uints>(p);
  Uints v = {};
  std::memcpy(&v, p, left * sizeof(uint32_t));
  return v;
}

INLINE void put(uint32_t* to, Uints v, int64_t left) {
  if (left >= LANES) return store(to, v);
  std::memcpy(to, &v, left * sizeof(uint32_t));
}

INLINE Ints some_bytes(const uint8_t* p, int64_t left) {
  int32_t wide[LANES] = {};
  for (int i = 0; i < (left < LANES ? left : LANES); ++i) wide[i] = p[i];
  return load<Ints>(wide);
}

constexpr int kRunRows = 32;  // whose codes of any width are whole words

// Adds the codes of 32 rows, `low` bits up, from the first word of a column on, of which there are
// so many; n: from one row of words to the next.
template <int Width>
INLINE void add_run(const uint32_t* from, int64_t n, int64_t words, int64_t left, int low,
                    Uints (&to)[kRunRows]) {
  Uints w[Width];
#pragma GCC unroll 8
  for (int i = 0; i < Width; ++i) w[i] = i < words ? some(from + i * n, left) : Uints{};
#pragma GCC unroll 32
  for (int i = 0; i < kRunRows; ++i) {
    const int word = i * Width / 32, at = i * Width % 32;
    Uints v = w[word] >> at;
    if (at + Width > 32) v |= w[word + 1] << (32 - at);
    to[i] |= (v & ((1u << Width) - 1)) << low;
  }
}

// Signs and mantissas of run number `run`; the words of a plane follow those of the one before.
INLINE void add_rests(const FloatPlanes& w, int64_t run, int64_t column, int64_t left,
                      Uints (&to)[kRunRows]) {
  const uint32_t* from = w.rest + column;
  for (int p = 0, low = 0; p < w.type.planes; ++p) {
    const int width = w.type.widths[p];
    const int64_t all = float_words(w.k, width), first = run * width;
    const uint32_t* here = from + first * w.n;
    if (width == 3) add_run<3>(here, w.n, all - first, left, low, to);
    if (width == 4) add_run<4>(here, w.n, all - first, left, low, to);
    if (width == 8) add_run<8>(here, w.n, all - first, left, low, to);
    from += all * w.n;
    low += width;
  }
}

template <int Bits>
INLINE void tile_of(const FloatTile& a) {
  const FloatPlanes& w = *a.planes;
  const int mantissa = w.type.mantissa, sign = mantissa + w.type.exponent;
  const uint32_t fraction = (1u << mantissa) - 1;
  const int64_t codes = float_words(w.k, Bits);
  for (int64_t c = 0; c < a.columns; c += LANES) {
    const int64_t column = a.column + c, left = a.columns - c;
    const Ints base = some_bytes(w.base + column, left);
    Uints near = {};
    if (Bits == 3) near = some(w.near + a.row / kBlockRows * w.n + column, left) & 0x3fffffff;
    for (int64_t first = 0; first < a.rows; first += kRunRows) {
      const int64_t run = (a.row + first) / kRunRows, word = run * Bits;
      Uints code[kRunRows] = {}, rest[kRunRows] = {};
      add_run<Bits>(w.codes + word * w.n + column, w.n, codes - word, left, 0, code);
      add_rests(w, run, column, left, rest);
      const int64_t rows = a.rows - first < kRunRows ? a.rows - first : kRunRows;
      for (int64_t i = 0; i < rows; ++i) {
        const Ints escaped = (Ints)(code[i] == (1u << Bits) - 1);
        Ints exponent = {};
        if (Bits == 3) {
          exponent = base - 1 - (Ints)(near & 7);
          exponent &= ~(exponent >> 31);
          near = ((Uints)escaped & near >> 3) | (~(Uints)escaped & near);
        }
        exponent = (escaped & exponent) | (~escaped & (base + (Ints)code[i]));
        const Uints bits = rest[i] >> mantissa << sign | (Uints)exponent << mantissa |
                           (rest[i] & fraction);
        put(a.out + (first + i) * a.stride + c, bits << a.up, left);
      }
    }
  }
}

TARGET void float_tile(const FloatTile& a) {
  a.planes->bits == 3 ? tile_of<3>(a) : tile_of<4>(a);
}
