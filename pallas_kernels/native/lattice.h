// E8P codes to words of eight 4-bit integers: see e8p.cc.

typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

// What tables of signs would give for the lowest byte of every word, computed: a nibble 14 where a
// coordinate is negative, plus 1 for the shift upwards. Loads are what limits these products.
INLINE Uints sign_nibbles(Uints code) {
  static const uint8_t kParity[16] = {0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0};
  const Bytes low = (Bytes)(Uints{} + 0x08040201), high = (Bytes)(Uints{} + 0x80402010);
  Uints s = (code & 255) * 0x01010101;
  Bytes down = (Bytes)look_up(kParity, (s ^ (s >> 4)) & 0x0f0f0f0f);
  Bytes signs = (Bytes)s ^ down;  // with bit 0 flipped where the shift is downwards
  Bytes even = (Bytes)((signs & low) == low) & 0x0e, odd = (Bytes)((signs & high) == high) & 0xe0;
  return (Uints)(even | odd | ((down - 1) & 0x11));
}

// Of the low (half 0) or high 16 bits of words. A row's table has the nibbles of its magnitudes.
TARGET void lattice(const uint32_t* words, int half, int64_t count, const uint32_t* rows,
                    const uint32_t* signs, uint32_t* to) {
  const uint8_t* bytes = (const uint8_t*)words + 2 * half;
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) {
    Uints code = load<Uints>(words + c) >> (16 * half);
    store(to + c, at(rows, bytes + 4 * c + 1) ^ sign_nibbles(code));
  }
  for (; c < count; ++c) to[c] = rows[bytes[4 * c + 1]] ^ signs[bytes[4 * c]];
}
