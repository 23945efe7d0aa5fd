// Float planes as calls hold them, and what they list.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "arguments.h"

namespace jaxquant {

constexpr size_t kFloatArrays = 6;  // of a matrix: codes, rest, base, near, where, exponent

// In the order of DTYPES of pallas_kernels/codecs/float_planes.py.
enum FloatName { kBfloat16, kFloat16, kSingle32, kE4M3, kE5M2 };
constexpr FloatType kFloatTypes[] = {
    {8, 7, 2, 1, {8}}, {5, 10, 2, 2, {8, 3}}, {8, 23, 4, 3, {8, 8, 8}}, {4, 3, 1, 1, {4}},
    {5, 2, 1, 1, {3}}};

// Nothing if an array is not what it should be.
inline std::optional<FloatPlanes> float_planes(const std::vector<Array>& arrays, int64_t k,
                                               int64_t n, int type, int bits) {
  if (type < 0 || type > kE5M2 || (bits != 3 && bits != 4)) return std::nullopt;
  FloatPlanes w{kFloatTypes[type], bits, k, n};
  int64_t rests = 0;
  for (int p = 0; p < w.type.planes; ++p) rests += float_words(k, w.type.widths[p]);
  const int64_t near = bits == 3 ? (k + kBlockRows - 1) / kBlockRows * n : 0;
  if (arrays[0].count != float_words(k, bits) * n || arrays[1].count != rests * n ||
      arrays[2].count != n || arrays[3].count != near || arrays[4].count != arrays[5].count)
    return std::nullopt;
  w.codes = arrays[0].as<uint32_t>();
  w.rest = arrays[1].as<uint32_t>();
  w.base = arrays[2].as<uint8_t>();
  w.near = arrays[3].as<uint32_t>();
  w.where = arrays[4].as<int32_t>();
  w.exponent = arrays[5].as<uint8_t>();
  w.listed = arrays[4].count;
  return w;
}

// The entries of column first + c: those from number c of the result to number c + 1. `where` is
// ascending; if it is not, the numbers are still some of its.
inline std::vector<int32_t> entries(const FloatPlanes& w, int64_t first, int64_t count) {
  std::vector<int32_t> starts(count + 1);
  const int32_t* end = w.where + w.listed;
  const int32_t* at = std::lower_bound(w.where, end, first * w.k, std::less<int64_t>());
  for (int64_t c = 0; c <= count; ++c) {
    while (at < end && *at < (first + c) * w.k) ++at;
    starts[c] = static_cast<int32_t>(at - w.where);
  }
  return starts;
}

// Gives what is listed in a tile its exponent. starts: of the tile's columns, as `entries` says.
inline void put_listed(const FloatTile& t, const int32_t* starts) {
  const FloatPlanes& w = *t.planes;
  const int mantissa = w.type.mantissa + t.up;
  const uint32_t mask = ((1u << w.type.exponent) - 1) << mantissa;
  for (int64_t c = 0; c < t.columns; ++c) {
    const int64_t place = (t.column + c) * w.k + t.row;
    const int32_t *begin = w.where + starts[c], *end = w.where + starts[c + 1];
    for (auto at = std::lower_bound(begin, end, place, std::less<int64_t>()); at < end; ++at) {
      const int64_t row = *at - place;
      if (row < 0 || row >= t.rows) break;
      uint32_t& bits = t.out[row * t.stride + c];
      bits = (bits & ~mask) | static_cast<uint32_t>(w.exponent[at - w.where]) << mantissa;
    }
  }
}

// Columns of a matrix that one thread takes: most is a multiple of 64.
inline int64_t share_of(int64_t n, int64_t threads, int64_t most) {
  const int64_t each = (n + threads * most - 1) / (threads * most) * threads;
  return std::max<int64_t>(64, ((n + each - 1) / each + 63) / 64 * 64);
}

}  // namespace jaxquant
