// How the words of each form become planes of bytes (for integer products) and floats.
//
// A form has `read(product, unit, column, words)`, which may make the words, `bytes(words)`, done
// once, `plane(words, p)`, the codes of a plane of
// a unit as bytes, each kOffset too large, and `value(words, i, table)`, number i as a float.

// Words that are read as they are stored.
struct Stored {
  template <int C, int W>
  INLINE static void read(const Product& a, int64_t unit, int64_t column, Uints (&w)[C][W]) {
    const uint32_t* from = a.words + unit * W * a.stride + column;
    if constexpr (C > 1) {  // the same columns of the next segment: rows are far apart in memory
      const uint32_t* next = from + a.units * W * a.stride;
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < C * LANES; c += 16) __builtin_prefetch(next + i * a.stride + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w[c][i] = load<Uints>(from + i * a.stride + c * LANES);
  }
};

template <int B>
struct Integer : Stored {
  static constexpr Unit kUnit = kUnits[B == 2 ? kInt2 : B == 4 ? kInt4 : kInt8];
  static constexpr int kWords = 1;
  static constexpr int kOffset = B == 8 ? 0 : 1 << (B - 1);

  // The top bit of every code flipped: two's complement becomes code + kOffset.
  INLINE static void bytes(Uints (&w)[1]) {
    if constexpr (B < 8) w[0] ^= B == 2 ? 0xaaaaaaaa : 0x88888888;
  }

  INLINE static Uints plane(const Uints (&w)[1], int p) {
    if constexpr (B == 8) return w[0];
    return (w[0] >> (B * p)) & (B == 2 ? 0x03030303 : 0x0f0f0f0f);
  }

  INLINE static Ints code(const Uints (&w)[1], int i) {
    return (Ints)(w[0] << (32 - B - B * i)) >> (32 - B);
  }

  INLINE static Uints index(const Uints (&w)[1], int i) {
    return (w[0] >> (B * i)) & ((1 << B) - 1);
  }
};

// 32 codes in three words. Byte planes need the 12 bytes in another order: byte b of the stream
// holds bits of code i as byte b + 3 does of code i + 8.
struct Integer3 : Stored {
  static constexpr Unit kUnit = kUnits[kInt3];
  static constexpr int kWords = 3;
  static constexpr int kOffset = 4;

  INLINE static void bytes(Uints (&w)[3]) {
    Uints a = w[0] ^ 0x24924924, b = w[1] ^ 0x49249249, c = w[2] ^ 0x92492492;
    gather(w, a, b, c);
  }

  // Byte j of w[i] becomes byte 3 j + i of the stream a, b, c.
  INLINE static void gather(Uints (&w)[3], Uints a, Uints b, Uints c) {
    constexpr uint32_t k0 = 0xff, k1 = 0xff00, k2 = 0xff0000, k3 = 0xff000000;
    w[0] = (a & k0) | ((a >> 16) & k1) | (b & k2) | ((c << 16) & k3);
    w[1] = ((a >> 8) & k0) | ((b << 8) & k1) | ((b >> 8) & k2) | ((c << 8) & k3);
    w[2] = ((a >> 16) & k0) | (b & k1) | ((c << 16) & k2) | (c & k3);
  }

  INLINE static Uints plane(const Uints (&w)[3], int p) {
    int byte = 3 * p / 8, low = 3 * p % 8;
    Uints here = w[byte] >> low;
    if (low > 5) {  // the code goes on in the next byte
      uint32_t fits = ((1 << (8 - low)) - 1) * 0x01010101u;
      return (here & fits) | ((w[byte + 1] << (8 - low)) & (0x07070707 & ~fits));
    }
    return here & 0x07070707;
  }

  INLINE static Uints at_top(const Uints (&w)[3], int i) {
    int word = 3 * i / 32, low = 3 * i % 32;
    if (low > 29) return (w[word] >> low | w[word + 1] << (32 - low)) << 29;
    return w[word] << (29 - low);
  }

  INLINE static Ints code(const Uints (&w)[3], int i) { return (Ints)at_top(w, i) >> 29; }
  INLINE static Uints index(const Uints (&w)[3], int i) { return at_top(w, i) >> 29; }
};

template <class Code>
struct Whole : Code {
  static constexpr bool kTabled = false;
  INLINE static Floats value(const Uints (&w)[Code::kUnit.words], int i, const Table*) {
    return to_floats(Code::code(w, i));
  }
};

template <class Code>
struct Tabled : Code {
  static constexpr bool kTabled = true;
  INLINE static void bytes(Uints (&w)[Code::kUnit.words]) {
    if constexpr (Code::kUnit.words == 3) Code::gather(w, w[0], w[1], w[2]);
  }
  INLINE static Floats value(const Uints (&w)[Code::kUnit.words], int i, const Table* table) {
    return pick(table->values, Code::index(w, i));
  }
};

struct Float32 {
  static constexpr Unit kUnit = kUnits[kFloat32];
  static constexpr int kWords = 1;
  template <int C>
  INLINE static void read(const Product& a, int64_t unit, int64_t column, Uints (&w)[C][1]) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) w[c][0] = load<Uints>(a.words + unit * a.stride + column + c * LANES);
  }
  INLINE static Floats value(const Uints (&w)[1], int, const Table*) { return (Floats)w[0]; }
};
