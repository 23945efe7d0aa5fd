// Slots of a cache of keys or values as floats.

#pragma once

#include "kernels.h"

namespace jaxquant {

constexpr int64_t kRun = 64;  // slots that are widened to floats at a time

// Slots of one head.
struct Slots {
  const char* data;
  ScaleType type;
  int64_t width;

  // Some of them as floats, in place if they are that.
  const float* read(int64_t first, int64_t count, const Kernels& kernels, float* room) const {
    const int64_t at = first * width;
    if (type == kSingle) return reinterpret_cast<const float*>(data) + at;
    kernels.widen(data + 2 * at, type, count * width, room);
    return room;
  }
};

}  // namespace jaxquant
