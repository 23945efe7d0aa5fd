// Attention of a few queries over rows of keys and of values: its three steps; and such rows from
// the codes of a packed cache.

template <int R, int C>
INLINE void add_rows(const float* weights, int64_t stride, const float* rows, int64_t count,
                     int64_t width, float* out) {
  Floats sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = load<Floats>(out + r * width + c * LANES);
  for (int64_t i = 0; i < count; ++i, rows += width) {
    Floats row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load<Floats>(rows + c * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] = multiply_add(all(weights[r * stride + i]), row[c], sum[r][c]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + r * width + c * LANES, sum[r][c]);
}

template <int R>
INLINE void mix_rows(const float* weights, int64_t stride, const float* rows, int64_t count,
                     int64_t width, float* out) {
  int64_t at = 0;
  for (; at + 2 * LANES <= width; at += 2 * LANES)
    add_rows<R, 2>(weights, stride, rows + at, count, width, out + at);
  for (; at < width; at += LANES)
    add_rows<R, 1>(weights, stride, rows + at, count, width, out + at);
}

template <int R>
INLINE void score_rows(const float* q, const float* rows, int64_t count, int64_t width, float* to,
                       int64_t stride) {
  for (int64_t i = 0; i < count; ++i, rows += width) {
    Floats sum[R] = {};
    for (int64_t at = 0; at < width; at += LANES) {
      const Floats row = load<Floats>(rows + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = multiply_add(load<Floats>(q + r * width + at), row, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) to[r * stride + i] = total(sum[r]);
  }
}

TARGET void scores(const Attend& a, const float* rows, int64_t first, int64_t count) {
  int r = 0;
  auto q = [&] { return a.queries + r * a.width; };
  auto to = [&] { return a.weights + r * a.stride + first; };
  for (; r + 4 <= a.count; r += 4) score_rows<4>(q(), rows, count, a.width, to(), a.stride);
  switch (a.count - r) {
    case 3: return score_rows<3>(q(), rows, count, a.width, to(), a.stride);
    case 2: return score_rows<2>(q(), rows, count, a.width, to(), a.stride);
    case 1: return score_rows<1>(q(), rows, count, a.width, to(), a.stride);
  }
}

TARGET void mix(const Attend& a, const float* rows, int64_t first, int64_t count) {
  int r = 0;
  auto from = [&] { return a.weights + r * a.stride + first; };
  auto out = [&] { return a.out + r * a.width; };
  for (; r + 4 <= a.count; r += 4) mix_rows<4>(from(), a.stride, rows, count, a.width, out());
  switch (a.count - r) {
    case 3: return mix_rows<3>(from(), a.stride, rows, count, a.width, out());
    case 2: return mix_rows<2>(from(), a.stride, rows, count, a.width, out());
    case 1: return mix_rows<1>(from(), a.stride, rows, count, a.width, out());
  }
}

TARGET void by_channel(float* rows, int64_t count, int64_t width, const float* scale,
                       const float* offset) {
  for (int64_t at = 0; at < width; at += LANES) {
    const Floats s = load<Floats>(scale + at), o = load<Floats>(offset + at);
    for (float* x = rows + at; x < rows + count * width; x += width)
      store(x, multiply_add(load<Floats>(x), s, o));
  }
}

TARGET void by_row(float* rows, int64_t count, int64_t width, int64_t channels,
                   const float* scale, const float* offset, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t run = 0; run * channels < width; ++run) {
      const Floats s = all(scale[run * stride + i]), o = all(offset[run * stride + i]);
      float* x = rows + i * width + run * channels;
      for (int64_t at = 0; at < channels; at += LANES)
        store(x + at, multiply_add(load<Floats>(x + at), s, o));
    }
}

TARGET void turn(float* rows, int64_t count, int64_t width, const float* cos, const float* sin,
                 int64_t step) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < count; ++i, rows += width, cos += step, sin += step)
    for (int64_t at = 0; at < half; at += LANES) {
      const Floats a = load<Floats>(rows + at), b = load<Floats>(rows + half + at);
      const Floats c = load<Floats>(cos + at), s = load<Floats>(sin + at);
      store(rows + at, multiply_add(a, c, -(b * s)));
      store(rows + half + at, multiply_add(b, c, a * s));
    }
}

// e^x for x <= 0, from e^-87 on: 2^n times 2^f, |f| <= 1/2, by its series.
INLINE Floats power(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  const Floats t = x * 1.44269504f;
  const Ints n = __builtin_convertvector(t - 0.5f, Ints);
  const Floats f = (t - to_floats(n)) * 0.693147181f;
  Floats sum = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = multiply_add(sum, f, all(c));
  return sum * (Floats)((n + 127) << 23);
}

// e^(x - max x) in place, of whole vectors; returns the sum.
TARGET float exponentials(float* x, int64_t count) {
  float most = x[0];
  for (int64_t i = 1; i < count; ++i) most = x[i] > most ? x[i] : most;
  Floats sum = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats e = power(load<Floats>(x + i) - most);
    store(x + i, e);
    sum += e;
  }
  return total(sum);
}
