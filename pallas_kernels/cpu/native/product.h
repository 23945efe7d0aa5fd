// Products of packed words with a few rows of x, as in the comment of `Product`.
//
// C vectors of columns and R rows at a time: the sums stay in registers, a number of x is read
// once for C vectors, and words are unpacked once for R rows.

INLINE void add(float* y, Floats scale, Floats sum) {
  store(y, multiply_add(scale, sum, load<Floats>(y)));
}

// Integer sums, doubled so that a zero point may be half a number, to y.
template <int C, int R>
INLINE void finish(const Product& a, int64_t column, Ints (&total)[C][R], int32_t offset,
                   float unit) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const int32_t sum = ((const int32_t*)a.sums)[r];
    const Floats xscale = all(a.xscale[r] * unit * 0.5f);
    const float* scale = a.scale + column;
    const int32_t* zero = a.zero ? a.zero + column : nullptr;
    float* y = a.y + r * a.y_stride + column;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Ints doubled = total[c][r] * 2 - offset * sum;
      if (zero) doubled -= load<Ints>(zero + c * LANES) * sum;
      add(y + c * LANES, load<Floats>(scale + c * LANES) * xscale, to_floats(doubled));
    }
  }
}

// Sums of floats to y.
template <int C, int R>
INLINE void finish(const Product& a, int64_t column, Floats (&sum)[C][R], int32_t = 0, float = 1) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const Floats half = all(((const float*)a.sums)[r] * 0.5f), xscale = all(a.xscale[r]);
    const float* scale = a.scale + column;
    const int32_t* zero = a.zero ? a.zero + column : nullptr;
    float* y = a.y + r * a.y_stride + column;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Floats value = sum[c][r];
      if (zero) value -= to_floats(load<Ints>(zero + c * LANES)) * half;
      add(y + c * LANES, load<Floats>(scale + c * LANES) * xscale, value);
    }
  }
}

template <class F, int C, int R>
INLINE void integers(const Product& a, int64_t column) {
  constexpr Unit u = F::kUnit;
  constexpr int kChunk = room(u.bits) >= u.planes ? room(u.bits) / u.planes : 1;
  Ints total[C][R] = {};
  const int32_t* x = (const int32_t*)a.x;
  for (int unit = 0; unit < a.units;) {
    int stop = unit + kChunk < a.units ? unit + kChunk : a.units;
    Narrow sum[C][R] = {};
    for (; unit < stop; ++unit) {
      Uints w[C][F::kWords];
      F::read(a, unit, column, w);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) F::bytes(w[c]);
#pragma GCC unroll 8
      for (int p = 0; p < u.planes; ++p) {
        Uints plane[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) plane[c] = F::plane(w[c], p);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          Ints four = all(*x++);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sum[c][r] = dot(sum[c][r], plane[c], four);
        }
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) total[c][r] = widened(total[c][r], sum[c][r]);
  }
  finish<C, R>(a, column, total, 2 * F::kOffset, 1.0f);
}

template <int C, int R>
INLINE void signed_bytes(const Product& a, int64_t column) {
  Ints total[C][R] = {};
  const int32_t* x = (const int32_t*)a.x;
  for (int unit = 0; unit < a.units; ++unit) {
    Uints w[C][1];
    Stored::read(a, unit, column, w);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Ints four = all(*x++);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[c][r] = dot_signed(total[c][r], w[c][0], four);
    }
  }
  finish<C, R>(a, column, total, 0, 1.0f);
}

// A table's values to 14 bits, as two sums: of the high and of the low seven bits.
template <class F, int R>
INLINE void tabled(const Product& a, int64_t column) {
  constexpr Unit u = F::kUnit;
  Ints high[1][R] = {}, low[1][R] = {};
  const int32_t* x = (const int32_t*)a.x;
  for (int unit = 0; unit < a.units; ++unit) {
    Uints w[1][F::kWords];
    F::read(a, unit, column, w);
    F::bytes(w[0]);
#pragma GCC unroll 8
    for (int p = 0; p < u.planes; ++p) {
      Uints index = F::plane(w[0], p);
      Uints top = look_up(a.table->high, index), rest = look_up(a.table->low, index);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        Ints four = all(*x++);
        high[0][r] = widened(high[0][r], dot(Narrow{}, top, four));
        low[0][r] = widened(low[0][r], dot(Narrow{}, rest, four));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) high[0][r] = high[0][r] * 128 + low[0][r];
  finish<1, R>(a, column, high, a.table->offset, a.table->unit);
}

template <class F, int C, int R>
INLINE void floats(const Product& a, int64_t column) {
  constexpr Unit u = F::kUnit;
  Floats sum[C][R] = {};
  const float* x = (const float*)a.x;
  for (int unit = 0; unit < a.units; ++unit) {
    Uints w[C][F::kWords];
    F::read(a, unit, column, w);
#pragma GCC unroll 32
    for (int i = 0; i < u.codes; ++i) {
      Floats value[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[c] = F::value(w[c], i, a.table);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        Floats one = all(*x++);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[c][r] = multiply_add(value[c], one, sum[c][r]);
      }
    }
  }
  finish<C, R>(a, column, sum);
}

// All columns: C vectors at a time, then one by one.
#define MULTIPLY(NAME, WIDE, ONE)                                             \
  TARGET void NAME(const Product& a) {                                        \
    int64_t column = 0;                                                       \
    for (; column + C * LANES <= a.columns; column += C * LANES) WIDE;        \
    for (; column < a.columns; column += LANES) ONE;                          \
  }

template <class F, int C, int R>
MULTIPLY(multiply_integers, (integers<F, C, R>(a, column)), (integers<F, 1, R>(a, column)))
template <int C, int R>
MULTIPLY(multiply_bytes, (signed_bytes<C, R>(a, column)), (signed_bytes<1, R>(a, column)))
template <class F, int R, int C = 1>
MULTIPLY(multiply_tabled, (tabled<F, R>(a, column)), (tabled<F, R>(a, column)))
template <class F, int C, int R>
MULTIPLY(multiply_floats, (floats<F, C, R>(a, column)), (floats<F, 1, R>(a, column)))
#undef MULTIPLY

// All numbers of some units as floats [k, columns].
template <class F>
TARGET void unpack(const Product& a, float* out) {
  constexpr Unit u = F::kUnit;
  for (int unit = 0; unit < a.units; ++unit, out += u.codes * a.columns)
    for (int64_t column = 0; column < a.columns; column += LANES) {
      Uints w[1][F::kWords];
      F::read(a, unit, column, w);
#pragma GCC unroll 32
      for (int i = 0; i < u.codes; ++i)
        store(out + i * a.columns + column, F::value(w[0], i, a.table));
    }
}

TARGET void scaled(const Product& p, int64_t column, int64_t width, float* to, bool onto) {
  const int64_t end = column + width < p.columns ? column + width : p.columns;
  for (int64_t c = column; c < end; c += LANES, to += LANES) {
    const Floats scale = load<Floats>(p.scale + c);
    const Floats zero = p.zero ? to_floats(load<Ints>(p.zero + c)) * 0.5f : Floats{};
    const uint32_t* from = p.words + c;
    for (int i = 0; i < p.units; ++i) {
      const Floats value = (load<Floats>(from + i * p.stride) - zero) * scale;
      store(to + i * width, onto ? value + load<Floats>(to + i * width) : value);
    }
  }
}

// Vectors of columns for 6, 4, 2 and 1 rows.
#ifdef PLAIN  // where vectors are emulated, less code
#define BY_ROWS(NAME, F) {nullptr, NAME<F, 1, 4>, NAME<F, 1, 2>, NAME<F, 1, 1>}
#else
#define BY_ROWS(NAME, F) {nullptr, NAME<F, 2, 4>, NAME<F, 2, 2>, NAME<F, 4, 1>}
#endif
#define BY_ROWS_TABLED(F) \
  {nullptr, multiply_tabled<F, 4>, multiply_tabled<F, 2>, multiply_tabled<F, 1>}
