// The products that a call asks for: all rows of x with every matrix; or, of stacks of matrices,
// the rows of x that belong to each.

#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

#include "arguments.h"

namespace jaxquant {

// Rows of x with one matrix.
struct Call {
  const float* x;
  float* y;
  int64_t n;
  std::vector<Array> arrays;
};

// By their number of rows: the same work prepares and shares out those that have equally many.
using Calls = std::map<int64_t, std::vector<Call>>;

// Number i of a stack.
inline Array part(const ffi::AnyBuffer& a, int64_t i) {
  const auto of = a.dimensions();
  if (of.size() < 2) return whole(a);  // there is none
  const int64_t count = a.element_count() / std::max<int64_t>(1, of.front());
  const int64_t bytes = count * ffi::ByteWidth(a.element_type());
  return {static_cast<const char*>(a.untyped_data()) + i * bytes, a.element_type(),
          {of.begin() + 1, of.size() - 1}, count};
}

// Nothing if an array is missing. groups: rows of x for each matrix of stacks of so many; rows past
// the last give zeros. Empty: every matrix has all rows.
inline std::optional<Calls> calls(const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::S32>& groups,
                                  ffi::RemainingArgs& args, ffi::RemainingRets& results,
                                  size_t arrays) {
  Calls found;
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1];
  for (size_t i = 0; i < results.size(); ++i) {
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!y) return std::nullopt;
    std::vector<ffi::AnyBuffer> buffers;
    for (size_t j = 0; j < arrays; ++j) {
      auto a = args.get<ffi::AnyBuffer>(arrays * i + j);
      if (!a) return std::nullopt;
      buffers.push_back(*a);
    }
    const int64_t n = (*y)->dimensions().back();
    float* to = (*y)->typed_data();
    auto add = [&](int64_t first, int64_t m, auto array) {
      Call call{x.typed_data() + first * k, to + first * n, n, {}};
      for (const auto& a : buffers) call.arrays.push_back(array(a));
      found[m].push_back(std::move(call));
    };
    const int64_t experts = groups.element_count();
    if (experts == 0) {
      add(0, rows, whole);
      continue;
    }
    int64_t first = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t m = std::clamp<int64_t>(groups.typed_data()[e], 0, rows - first);
      if (m > 0) add(first, m, [e](const ffi::AnyBuffer& a) { return part(a, e); });
      first += m;
    }
    std::fill(to + first * n, to + rows * n, 0.0f);
  }
  return found;
}

}  // namespace jaxquant
