// Products with tiles of a trellis code whose weights are sums of bytes, as each state comes out.
//
// Columns lie [run of LANES tiles][column of the tile][lane], as in decode.h, whose tiles go to
// memory: worth it where many rows of x meet them.

// A weight, 510 too large where x is an integer, times x, to the sum.
INLINE Ints add_weight(Ints sum, Uints bytes, Ints x) { return multiply_byte_sums(sum, bytes, x); }
INLINE Floats add_weight(Floats sum, Uints bytes, Floats x) {
  return multiply_add(byte_weight(bytes), x, sum);
}

template <int K, int J, int R, class V, class T, int... c>
INLINE void two_rows(const Stream& s, const T* x, V (&sum)[sizeof...(c)][R],
                     std::integer_sequence<int, c...>) {
  auto one = [&](auto column, auto row) __attribute__((always_inline)) TARGET {
    constexpr int kColumn = decltype(column)::value, kRow = decltype(row)::value;
    Uints bytes = weight_bytes<K, K * (16 * kRow + J + kColumn)>(s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      sum[kColumn][r] = add_weight(sum[kColumn][r], bytes, all(x[kRow * R + r]));
  };
  (one(std::integral_constant<int, c>(), std::integral_constant<int, 0>()), ...);
  (one(std::integral_constant<int, c>(), std::integral_constant<int, 1>()), ...);
}

// Columns J ... J + C of a run of tiles, down all rows of the segment.
template <int K, int J, int C, int R, class V, class T>
INLINE void tile_columns(const Product& a, int64_t run) {
  V sum[C][R] = {};
  const T* x = (const T*)a.x;
  Stream s = stream(*a.trellis, a.stride);
  for (int unit = 0; unit < a.units; ++unit) {
    const uint32_t* tile = a.words + unit * 8 * K * a.stride + run * LANES;
    for (int row = 0; row < 16; row += 2, x += 2 * R) {
      s.words = tile + row / 2 * K * a.stride;
      s.after = row == 14 ? tile : s.words + K * a.stride;
      two_rows<K, J, R>(s, x, sum, std::make_integer_sequence<int, C>());
    }
  }
  finish<C, R>(a, (run * 16 + J) * LANES, sum, 2 * 510, 1.0f);
}

template <int K, int C, int R, class V, class T, int... g>
INLINE void tile_run(const Product& a, int64_t run, std::integer_sequence<int, g...>) {
  (tile_columns<K, g * C, C, R, V, T>(a, run), ...);
}

template <int K, int C, int R, class V, class T>
TARGET void multiply_runs(const Product& a) {
  for (int64_t run = 0; run * 16 * LANES < a.columns; ++run)
    tile_run<K, C, R, V, T>(a, run, std::make_integer_sequence<int, 16 / C>());
}

// Of a block of rows that are all zero; but a scale that is no number shows.
template <int R>
INLINE void add_zeros(const Product& a) {
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < a.columns; ++c)
      a.y[r * a.y_stride + c] += a.scale[c] * a.xscale[r] * 0.0f;
}

template <int C, int R, class V, class T>
TARGET void multiply_tiles(const Product& a) {
  switch (a.rate) {
    case 0: return add_zeros<R>(a);
    case 1: return multiply_runs<1, C, R, V, T>(a);
    case 2: return multiply_runs<2, C, R, V, T>(a);
    case 3: return multiply_runs<3, C, R, V, T>(a);
    case 4: return multiply_runs<4, C, R, V, T>(a);
  }
}

#ifdef PLAIN
#define TILES(V, T) {nullptr, nullptr, nullptr, multiply_tiles<1, 1, V, T>}
#else
#define TILES(V, T) {nullptr, multiply_tiles<2, 4, V, T>, nullptr, multiply_tiles<8, 1, V, T>}
#endif
