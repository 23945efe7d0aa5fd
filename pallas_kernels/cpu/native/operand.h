// Packed matrices as the driver of products sees them.

#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "kernels.h"

namespace jaxquant {

// Scales [groups, n], or [groups, 1], as they are stored.
struct Scales {
  const void* data;
  ScaleType type;
  bool shared;  // one for all columns
  float factor = 1.0f;
};

// Some row-major words, the first column of interest first.
struct Words {
  const uint32_t* data;
  int64_t stride;
};

// One packed matrix [k, n]: where its words are, or how they come out of other storage.
class Operand {
 public:
  virtual ~Operand() = default;

  // The words of a segment, columns first ... first + count, in a multiple of 16 columns. What is
  // not stored that way is written to `room`, which has `columns` of 32 bits for each row of words.
  virtual Words words(const Segment& segment, int64_t first, int64_t count, int64_t columns,
                      uint32_t* room) const = 0;

  // Twice the zero points of a group; false where all are zero.
  virtual bool zeros(int64_t group, int64_t first, int64_t count, const Kernels& kernels,
                     int32_t* twice) const {
    return false;
  }

  // Bits of a weight of a trellis code.
  virtual int rate(int64_t group) const { return 0; }

  Form form;
  Scales scales;
  const Table* table = nullptr;
  const TrellisCode* trellis = nullptr;
  const uint32_t* rows = nullptr;
};

// Integers beside those of the words: of a row, its number in the low 16 bits, and a value in the
// high. ranges [2, n]: where those of a column begin and end.
struct Escapes {
  const int32_t *words, *ranges;
  int64_t count;
  const float* scale;  // [n]
};

// One product y = x @ (sum of operands). Tasks of one x share what is prepared of it.
struct Task {
  std::vector<const Operand*> operands;
  float* y;  // [m, n]
  int64_t n;
  int64_t interleaved = 1;  // columns that a tile of the words has side by side
  const float* x = nullptr;  // [m, k]
  const Escapes* escapes = nullptr;  // with an x in floats
};

// y of all tasks. group_size: rows that share scales; longest: rows of a segment at most;
// wide: columns that are done at a time at most.
struct Shape {
  int64_t m, k, group_size, longest, wide;
  Activations activations;
};

// From so many rows of x on, floats are worth making in memory first.
constexpr int64_t kManyRows = 12;

void multiply(int64_t most_threads, const Kernels& kernels, const Shape& shape,
              const std::vector<Task>& tasks);

}  // namespace jaxquant
