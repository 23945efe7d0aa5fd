// What the handlers of all formats read alike from a call.

#pragma once

#include <cstring>
#include <optional>

#include "operand.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const char* what) { return ffi::Error::InvalidArgument(what); }

// An array of one matrix: of a call, or its part of a stack, where that is.
struct Array {
  const char* data;
  ffi::DataType type;
  ffi::Span<const int64_t> dimensions;
  int64_t count;

  template <class T>
  const T* as() const { return reinterpret_cast<const T*>(data); }
};

inline Array whole(const ffi::AnyBuffer& a) {
  return {static_cast<const char*>(a.untyped_data()), a.element_type(), a.dimensions(),
          static_cast<int64_t>(a.element_count())};
}

inline std::optional<Scales> scales(const Array& a) {
  Scales s;
  s.data = a.data;
  s.shared = a.dimensions.back() == 1;
  switch (a.type) {
    case ffi::DataType::F16: s.type = kHalf; return s;
    case ffi::DataType::BF16: s.type = kBrain; return s;
    case ffi::DataType::F32: s.type = kSingle; return s;
    default: return std::nullopt;
  }
}

inline std::optional<Scales> scales(const ffi::AnyBuffer& a) { return scales(whole(a)); }

// Words that stand in rows of n: in place, or the last few columns copied and padded.
inline Words in_rows(const uint32_t* words, int64_t n, int64_t row, int64_t rows, int64_t first,
                     int64_t count, int64_t columns, uint32_t* room) {
  const uint32_t* from = words + row * n + first;
  if (count == columns) return {from, n};
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(room + i * columns, from + i * n, count * sizeof(uint32_t));
    std::memset(room + i * columns + count, 0, (columns - count) * sizeof(uint32_t));
  }
  return {room, columns};
}

}  // namespace jaxquant
