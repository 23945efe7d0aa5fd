// Matrices of packed integers or of codes of a table, as pallas_kernels/codecs/layout.py lays them out.

#pragma once

#include <algorithm>

#include "arguments.h"

namespace jaxquant {

class Packed : public Operand {
 public:
  const uint32_t* codes;      // [words, n]
  const uint32_t* zero_words = nullptr;  // [groups, words of n]
  int64_t n;

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    const int per = kUnits[form].words;
    return in_rows(codes, n, s.unit * per, s.units * per, first, count, columns, room);
  }

  bool zeros(int64_t group, int64_t first, int64_t count, const Kernels& kernels,
             int32_t* twice) const override {
    if (!zero_words) return false;
    const int bits = kUnits[form].bits;
    const int64_t run = bits == 3 ? 32 : 32 / bits, per = bits == 3 ? 3 : 1;
    const int64_t width = scales.shared ? 1 : n;
    const uint32_t* from = zero_words + group * ((width + run - 1) / run) * per;
    if (!scales.shared) {
      kernels.zeros(from, bits, first, count, twice);
    } else {
      kernels.zeros(from, bits, 0, 1, twice);
      std::fill_n(twice, count, int32_t{*twice});
    }
    return true;
  }
};

}  // namespace jaxquant
