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
  const float scale = absmax > 0 ? absmax / 127 : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] / scale;
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
  for (; i < count; ++i) {
    int64_t bit = (first + i) * bits, word = bit / 32;
    int low = bit % 32;
    uint32_t v = words[word] >> low;
    if (low + bits > 32) v |= words[word + 1] << (32 - low);
    twice[i] = (int32_t)(v << (32 - bits)) >> (32 - bits) << 1;
  }
}

// The state of every tile at a bit: L bits of its stream, the most significant first.
INLINE Uints states(const TrellisTiles& a, int bit) {
  const uint32_t* w = a.words + bit / 32 * LANES;
  int low = bit % 32;
  Uints window = load<Uints>(w) << low;
  if (low + a.L > 32) window |= load<Uints>(w + LANES) >> (32 - low);
  return window >> (32 - a.L);
}

TARGET void trellis(const TrellisTiles& a) {
  for (int i = 0; i < 256; i += a.weights) {
    Uints state = states(a, i * a.rate);
    float* out = a.out + i / 16 * a.stride + i % 16 * LANES;
    if (!a.table) {
      Ints sum = byte_sums(state * a.factor + a.term) - 510;
      store(out, to_floats(sum) * a.unit);
      continue;
    }
    for (int lane = 0; lane < LANES; ++lane)
      for (int v = 0; v < a.weights; ++v)
        out[v * LANES + lane] = a.table[(int64_t)state[lane] * a.weights + v];
  }
}
