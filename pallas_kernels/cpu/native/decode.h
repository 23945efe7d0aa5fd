// Scales, zero points, activations and trellis tiles, as one instruction set reads them.

TARGET void widen(const void* from, ScaleType type, int64_t count, float* to) {
  int64_t i = 0;
  if (type == kSingle) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (type == kBrain) {
    const uint16_t* p = (const uint16_t*)from;
    for (; i < count; ++i) {
      uint32_t bits = (uint32_t)p[i] << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  } else {
    const uint16_t* p = (const uint16_t*)from;
    for (; i + LANES <= count; i += LANES) store(to + i, from_halves(p + i));
    uint16_t last[LANES] = {};
    float wide[LANES];
    if (i < count) std::memcpy(last, p + i, (count - i) * sizeof(uint16_t));
    store(wide, from_halves(last));
    if (i < count) std::memcpy(to + i, wide, (count - i) * sizeof(float));
  }
}

TARGET float quantize(const float* x, int64_t count, float* q) {
  int32_t most = 0;  // the order of floats >= 0 is that of their bits
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float absmax;
  std::memcpy(&absmax, &most, sizeof absmax);
  if (most >= 0x7f800000) {  // infinite, or NaN
    std::memset(q, 0, count * sizeof(float));
    return __builtin_nanf("");
  }
  // As `activations.quantize` does it: its codes are to be met to the last bit.
  float scale = absmax * (1.0f / 127);
  if (scale < 0x1p-126f) scale = 1.0f;
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] * inverse;
    v = v > 127 ? 127 : v < -127 ? -127 : v;
    q[i] = (v + 0x1.8p23f) - 0x1.8p23f;  // to a whole number, halves to even
  }
  return scale;
}

// Twice the zero points first ... first + count of a row of words.
TARGET void zeros(const uint32_t* words, int bits, int64_t first, int64_t count, int32_t* twice) {
  int64_t i = 0;
  if (bits == 2 || bits == 4) {
    const int per = 32 / bits, at = 32 - bits;
    if (first % per == 0) {
      const uint32_t* w = words + first / per;
      for (; i + per <= count; i += per, ++w)
        for (int j = 0; j < per; ++j) twice[i + j] = (int32_t)(*w << (at - bits * j)) >> at << 1;
    }
  }
  if (bits == 8) {
    const int8_t* codes = (const int8_t*)words + first;
    for (; i < count; ++i) twice[i] = 2 * codes[i];
  }
  for (; i < count; ++i) {
    int64_t bit = (first + i) * bits, word = bit / 32;
    int low = bit % 32;
    uint32_t v = words[word] >> low;
    if (low + bits > 32) v |= words[word + 1] << (32 - low);
    twice[i] = (int32_t)(v << (32 - bits)) >> (32 - bits) << 1;
  }
}

struct Stream {
  const uint32_t *words, *after;  // of two rows of LANES tiles, and the word behind them
  int64_t stride;
  Uints drop, factor, term;
};

INLINE Stream stream(const TrellisCode& code, int64_t stride) {
  return {nullptr, nullptr, stride, Uints{} + (32 - code.L), Uints{} + code.factor,
          Uints{} + code.term};
}

// A weight of these bytes.
INLINE Floats byte_weight(Uints bytes) {
  return to_floats(multiply_byte_sums(Ints{} - 510, bytes, all(0x01010101)));
}

// The bytes of the weight whose state begins at bit kBit of two rows, of K words.
template <int K, int kBit>
INLINE Uints weight_bytes(const Stream& s) {
  constexpr int kWord = kBit / 32, kLow = kBit % 32;
  Uints window = load<Uints>(s.words + kWord * s.stride);
  if constexpr (kLow > 16) {  // L is at most 16: only these go on in the next word
    const uint32_t* next = kWord + 1 < K ? s.words + (kWord + 1) * s.stride : s.after;
    window = (window << 16 | load<Uints>(next) >> 16) << (kLow - 16);  // shared by several weights
  } else {
    window <<= kLow;
  }
  return (window >> s.drop) * s.factor + s.term;
}

template <int K, int... i>
INLINE void byte_sum_steps(const Stream& s, float* out, int64_t stride,
                           std::integer_sequence<int, i...>) {
  (store(out + i / 16 * stride + i % 16 * LANES,
         byte_weight(weight_bytes<K, K * i>(s))), ...);
}

// After two rows of a tile the stream is at the start of a word again, for every K.
template <int K>
TARGET void by_byte_sums(const TrellisTiles& a) {
  Stream s = stream(*a.code, LANES);
  for (int row = 0; row < 16; row += 2) {
    s.words = a.words + row / 2 * K * LANES;
    s.after = s.words + K * LANES;
    byte_sum_steps<K>(s, a.out + row * a.stride, a.stride, std::make_integer_sequence<int, 32>());
  }
}

TARGET void by_table(const TrellisTiles& a) {
  for (int i = 0; i < 256; i += a.code->weights) {
    int bit = i * a.rate, low = bit % 32;
    const uint32_t* w = a.words + bit / 32 * LANES;
    Uints window = load<Uints>(w) << low;
    if (low) window |= load<Uints>(w + LANES) >> (32 - low);
    Uints state = window >> (32 - a.code->L);
    float* out = a.out + i / 16 * a.stride + i % 16 * LANES;
    for (int lane = 0; lane < LANES; ++lane)
      for (int v = 0; v < a.code->weights; ++v)
        out[v * LANES + lane] = a.code->table[(int64_t)state[lane] * a.code->weights + v];
  }
}

TARGET void trellis(const TrellisTiles& a) {
  if (a.code->table) return by_table(a);
  switch (a.rate) {
    case 1: return by_byte_sums<1>(a);
    case 2: return by_byte_sums<2>(a);
    case 3: return by_byte_sums<3>(a);
    case 4: return by_byte_sums<4>(a);
    case 5: return by_byte_sums<5>(a);
    case 6: return by_byte_sums<6>(a);
    case 7: return by_byte_sums<7>(a);
    case 8: return by_byte_sums<8>(a);
  }
}
