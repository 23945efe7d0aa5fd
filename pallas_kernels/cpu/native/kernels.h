// What the products of one instruction set offer to the drivers: a table of functions.
//
// Each for_*.cc file compiles product.h and decode.h for its instruction set and fills one table.

#pragma once

#include <cstdint>

namespace jaxquant {

// How the words of an operand stand for numbers.
// kByteSums: tiles of a trellis code whose weights are sums of bytes. kLattice: codes of E8P.
enum Form {
  kInt2, kInt3, kInt4, kInt8, kTable2, kTable3, kTable4, kFloat32, kByteSums, kLattice,
  kForms
};

// A unit is the shortest run of whole words: `codes` rows of k in `words` words of a column. Its
// codes p, p + step, p + 2 step, p + 3 step come out together, as plane p < step, one in each byte;
// where there are more planes, the next are those of the codes from 4 step on. Without planes
// codes come out one by one. Tiles have at most `words`.
struct Unit {
  int bits, codes, words, planes, step;
};

constexpr Unit kUnits[kForms] = {{2, 16, 1, 4, 4}, {3, 32, 3, 8, 8}, {4, 8, 1, 2, 2},
                                 {8, 4, 1, 1, 1},  {2, 16, 1, 4, 4}, {3, 32, 3, 8, 8},
                                 {4, 8, 1, 2, 2},  {32, 1, 1, 0, 1}, {8, 16, 32, 0, 1},
                                 {4, 16, 1, 4, 2}};

// Sixteen values: as floats, and as unit * (128 high + low - offset / 2) with seven-bit integers.
struct Table {
  float values[16];
  uint8_t high[16], low[16];
  float unit;
  int32_t offset;
};

// A trellis code of states of L bits.
struct TrellisCode {
  int L, weights;         // bits, and weights, of a state
  uint32_t factor, term;  // a weight is the sum of the bytes of state * factor + term, less 510
  const float* table;     // [2^L, weights]; null: byte sums
};

// y[r, c] += scale[c] * xscale[r] * sum over k of x[r, k] * (value[k, c] - zero[c] / 2), where k
// runs over some units, c over columns (a multiple of 16) and r over the kernel's rows.
struct Product {
  const uint32_t* words;
  int64_t stride;  // from one row of words to the next
  int units, columns;
  // integers: int32 [units, planes, rows], four int8 each, or [k, rows], one four times, where
  // there are no planes; floats: [k, rows].
  const void* x;
  const void* sums;  // [rows], of x over these units: int32, or float
  const float* xscale;  // [rows]
  const float* scale;   // [columns]
  const int32_t* zero;  // [columns], twice the zero point; or null, where all are zero
  const Table* table;
  const TrellisCode* trellis;
  const uint32_t* rows;  // [256], of kLattice
  int rate;  // bits of a weight of a trellis code
  float* y;
  int64_t y_stride;
};

using Multiply = void (*)(const Product&);

constexpr int kRows[] = {6, 4, 2, 1};  // that a product kernel takes at a time

// A run of trellis tiles side by side, to be decoded.
struct TrellisTiles {
  const uint32_t* words;  // [8 rate + 1, lanes]: the first row again at the end
  int rate;  // bits of a weight
  const TrellisCode* code;
  float* out;      // [16 rows, 16 columns, lanes]
  int64_t stride;  // from row to row
};

// Some queries of one head, each with a number for every slot of the cache, and their results.
struct Attend {
  const float* queries;  // [count, width]
  int count;
  int64_t width;   // a multiple of 16
  float* weights;  // [count, stride]
  int64_t stride;
  float* out;  // [count, width]
};

enum ScaleType { kHalf, kBrain, kSingle };

constexpr int kBlockRows = 128;  // that share a word of what escapes mean, in float planes

// How floats lie in planes (pallas_kernels/codecs/float_planes.py).
struct FloatType {
  int exponent, mantissa, bytes;  // bits, bits, bytes
  int planes, widths[3];          // of sign and mantissa, low bits first
};

// Words of a column of k codes, as pallas_kernels/codecs/layout.py counts them.
inline int64_t float_words(int64_t k, int bits) {
  return bits == 3 ? (k + 31) / 32 * 3 : (k * bits + 31) / 32;
}

// The words of one matrix [k, n] of float planes.
struct FloatPlanes {
  FloatType type;
  int bits;  // of a code
  int64_t k, n;
  const uint32_t *codes, *rest, *near;  // near: null at 4 bits
  const uint8_t* base;
  const int32_t* where;
  const uint8_t* exponent;
  int64_t listed;  // entries of both
};

// A block of 128 rows, or those up to the last, of some columns, without what is listed: bits of
// floats, moved up, in words.
struct FloatTile {
  const FloatPlanes* planes;
  int64_t row, column, rows, columns;
  int up;
  uint32_t* out;  // [rows, stride]
  int64_t stride;
};

// y += x @ w for some columns of bfloat16 planes, with all that is listed there.
struct FloatProduct {
  const FloatPlanes* planes;
  int64_t first, count;  // columns
  int64_t m;
  const float* x;        // [blocks, m, 128]; of four channels, in the order 0, 2, 1, 3
  float* y;              // [m, n] of the whole matrix
  int32_t *at, *end;     // [count], the next entry of each column, and behind its last; `at` moves
  int32_t* next;         // [count up to 16], the row of that entry, or INT32_MAX
};

struct Kernels {
  const char* name;
  int lanes;                         // floats of a vector
  Multiply integers[kForms][4];      // by form and the place of the rows in kRows; may be null
  Multiply floats[kForms][4];
  void (*unpack[kForms])(const Product&, float*);  // null from kFloat32 on
  // Floats, p.words, of `width` columns from one on, less their zero points, scaled: [units, width].
  // With `onto`, added to what is there.
  void (*scaled)(const Product& p, int64_t column, int64_t width, float* to, bool onto);
  void (*widen)(const void* from, ScaleType type, int64_t count, float* to);
  // q = round(x / s), s = absmax / 127, or 1 where that is no normal number; and where x is not
  // finite, q = 0 and s is NaN.
  float (*quantize)(const float* x, int64_t count, float* q);
  void (*zeros)(const uint32_t* words, int bits, int64_t first, int64_t count, int32_t* twice);
  void (*trellis)(const TrellisTiles&);
  // Words of nibbles from the 16-bit codes in one half of some words.
  void (*lattice)(const uint32_t* words, int half, int64_t count, const uint32_t* rows,
                  const uint32_t* signs, uint32_t* to);
  // For slots first ... first + count, whose rows are given: weights = queries . rows.
  void (*scores)(const Attend&, const float* rows, int64_t first, int64_t count);
  // out += weights @ rows.
  void (*mix)(const Attend&, const float* rows, int64_t first, int64_t count);
  // Codes of rows of `width` channels to what they stand for, code * scale + offset: with a scale
  // for each channel, or one for each row and `channels`, those of a row `stride` apart.
  void (*by_channel)(float* rows, int64_t count, int64_t width, const float* scale,
                     const float* offset);
  void (*by_row)(float* rows, int64_t count, int64_t width, int64_t channels, const float* scale,
                 const float* offset, int64_t stride);
  // Turns the pairs (i, i + width / 2) of rows by angles given by cosines and sines; those of the
  // next row are `step` further.
  void (*turn)(float* rows, int64_t count, int64_t width, const float* cos, const float* sin,
               int64_t step);
  // x = e^(x - max x), of a multiple of 16 numbers; the sum.
  float (*exponentials)(float* x, int64_t count);
  void (*float_tile)(const FloatTile&);
  void (*float_product)(const FloatProduct&);  // null: there is none
};

// The widest table that this machine can run, or number `most` of those it can, plainest first.
const Kernels& choose(int most);

}  // namespace jaxquant
