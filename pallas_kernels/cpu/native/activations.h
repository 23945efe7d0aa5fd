// x as the products read it: cut into segments of k, rows by fours, quantized if asked.

#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace jaxquant {

enum Activations { kAsFloat, kInt8Rows, kInt8Blocks, kCodes };  // codes: x holds integers

constexpr int64_t kBlock = 256;  // channels that share a scale in kInt8Blocks

// x [m, k] as `activations` says, in floats.
std::vector<float> rounded(const float* x, int64_t m, int64_t k, Activations activations,
                           const Kernels& kernels);

// Rows of k that share a scale of the weights and one of x: whole units, of which numbers before
// and after the segment meet zeros in x.
struct Segment {
  int64_t unit, units;  // the first of the matrix, and how many
  int64_t begin, end;   // rows of k
  int64_t group;        // of the scales of the weights
  int64_t at;           // units of all segments before
};

std::vector<Segment> segments(int64_t k, int64_t group_size, int codes, Activations activations,
                              int64_t longest);

// A few rows of x, and the number of the kernel for so many in kRows.
struct Rows {
  int64_t first;
  int count, kernel;
};

// The fewest, of what the kernels take.
std::vector<Rows> rows(int64_t m, const Multiply* kernels);

class Prepared {
 public:
  // integers: as planes of int8 for the integer products of a unit, or, where it has no planes, one
  // in all four bytes of a word; else as floats.
  Prepared(const float* x, int64_t m, int64_t k, const std::vector<Segment>& segments,
           const std::vector<Rows>& rows, Unit unit, Activations activations, bool integers,
           const Kernels& kernels, const std::function<void(int64_t, std::function<void(int64_t)>)>&
           parallel);

  const void* x(const Rows& r, const Segment& s) const {
    return data_.data() + (r.first * units_ + s.at * r.count) * per_unit_;
  }
  const void* sums(const Rows& r, int64_t segment) const {
    return sums_.data() + r.first * segments_ + segment * r.count;
  }
  const float* scales(const Rows& r, int64_t segment) const {
    return scales_.data() + r.first * segments_ + segment * r.count;
  }
  // A row with NaN or an infinity stands as zeros here, which integers can hold: it is the driver
  // that gives it a result of NaN.
  bool finite(int64_t row) const { return finite_[row]; }

 private:
  int64_t units_, segments_, per_unit_;  // numbers of 32 bits in a unit of one row
  std::vector<int32_t> data_, sums_;
  std::vector<float> scales_;
  std::vector<char> finite_;  // by row
};

}  // namespace jaxquant
