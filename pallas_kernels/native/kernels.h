// What the products of one instruction set offer to the drivers: a table of functions.
//
// Each for_*.cc file compiles product.h and decode.h for its instruction set and fills one table.

#pragma once

#include <cstdint>

namespace jaxquant {

// How the words of an operand stand for numbers.
enum Form { kInt2, kInt3, kInt4, kInt8, kTable2, kTable3, kTable4, kFloat32, kForms };

// A unit is the shortest run of whole words: `codes` rows of k in `words` words of a column. Its
// codes p, p + planes, p + 2 planes, p + 3 planes come out together, as plane p, one in each byte.
struct Unit {
  int bits, codes, words, planes;
};

constexpr Unit kUnits[kForms] = {{2, 16, 1, 4}, {3, 32, 3, 8}, {4, 8, 1, 2}, {8, 4, 1, 1},
                                 {2, 16, 1, 4}, {3, 32, 3, 8}, {4, 8, 1, 2}, {32, 1, 1, 0}};

// Sixteen values: as floats, and as unit * (128 high + low - offset / 2) with seven-bit integers.
struct Table {
  float values[16];
  uint8_t high[16], low[16];
  float unit;
  int32_t offset;
};

// y[r, c] += scale[c] * xscale[r] * sum over k of x[r, k] * (value[k, c] - zero[c] / 2), where k
// runs over some units, c over columns (a multiple of 16) and r over the kernel's rows.
struct Product {
  const uint32_t* words;
  int64_t stride;  // from one row of words to the next
  int units, columns;
  const void* x;     // integers: int32 [units, planes, rows], four int8 each; floats: [k, rows]
  const void* sums;  // [rows], of x over these units: int32, or float
  const float* xscale;  // [rows]
  const float* scale;   // [columns]
  const int32_t* zero;  // [columns], twice the zero point; or null, where all are zero
  const Table* table;
  float* y;
  int64_t y_stride;
};

using Multiply = void (*)(const Product&);

constexpr int kRows[] = {4, 2, 1};  // that a product kernel takes at a time

// A run of trellis tiles side by side, to be decoded.
struct TrellisTiles {
  const uint32_t* words;  // [8 rate + 1, lanes]: the first row again at the end
  int rate, L, weights;   // bits a weight, bits of a state, weights of a state
  uint32_t factor, term;  // the state times `factor` plus `term` has bytes whose sum is a weight
  float unit;             // ... less 510, times this
  const float* table;     // [2^L, weights]; null: compute
  float* out;             // [16 rows, 16 columns, lanes]
  int64_t stride;         // from row to row
};

enum ScaleType { kHalf, kBrain, kSingle };

struct Kernels {
  const char* name;
  int lanes;                         // floats of a vector
  Multiply integers[kForms][3];      // by form and the place of the rows in kRows; may be null
  Multiply floats[kForms][3];
  void (*widen)(const void* from, ScaleType type, int64_t count, float* to);
  // q = round(x / s), s = absmax / 127 (1 where all is 0), as int8 or as floats of such values.
  float (*quantize)(const float* x, int64_t count, float* q);
  void (*zeros)(const uint32_t* words, int bits, int64_t first, int64_t count, int32_t* twice);
  void (*trellis)(const TrellisTiles&);
};


// The widest table that this machine can run, or number `most` of those it can, plainest first.
const Kernels& choose(int most);

}  // namespace jaxquant
