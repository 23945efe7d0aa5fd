// E8P: every point of the lattice code is eight 4-bit integers.
//
// A coordinate is +-1/2, +-3/2 or +-5/2, plus or minus 1/4: an odd multiple of 1/4, hence
// (c + 1/2) / 2 with an integer c in -6 ... 5. With t = 0, 1, 2 for 1/2, 3/2, 5/2 and h = 1 for
// the shift upwards, c + 8 is 8 + 2 t + h, and for the negative coordinate 8 + 2 (-1 - t) + h:
// the same bits but for the upper three, inverted. So a code's row gives eight nibbles, its signs
// eight more, and their exclusive or is a word of `layout.pack` at 4 bits. pallas_kernels/cpu/__init__.py
// makes the tables of both.

#include <algorithm>
#include <array>
#include <cstring>
#include <new>

#include "calls.h"

namespace jaxquant {
namespace {

constexpr int kOctet = 8;

// Points of 16-bit codes, or of the bytes that the residuals of 3-bit codes are.
class Points : public Operand {
 public:
  const uint32_t* codes;
  const uint32_t* signs;  // [256] by the lower byte; null: bytes, and `rows` by the only one
  int64_t n;
  int twice;  // the zero point, times two
  const Kernels* kernels;

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    if (form == kLattice)
      return in_rows(codes, n, s.unit, s.units, first, count, columns, room);
    const int per = signs ? 2 : 4;
    for (int64_t i = 0; i < s.units; ++i) {
      const int64_t octet = s.unit + i, part = octet % per;
      const uint32_t* from = codes + octet / per * n + first;
      uint32_t* to = room + i * columns;
      if (signs) {
        kernels->lattice(from, static_cast<int>(part), count, rows, signs, to);
      } else {
        const uint32_t* table = rows;
        for (int64_t c = 0; c < count; ++c) to[c] = table[from[c] >> (8 * part) & 255];
      }
      std::fill_n(to + count, columns - count, 0u);
    }
    return {room, columns};
  }

  bool zeros(int64_t, int64_t, int64_t count, const Kernels&, int32_t* zero) const override {
    std::fill_n(zero, count, twice);
    return twice != 0;
  }
};

// tables: int32 [3, 256], nibbles of rows, of signs and of the bytes of a 3-bit code's residual.
// Of every matrix: codes, residual (empty at 2 bits), scale. fine: the residual's factor.
ffi::Error e8p(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
               ffi::Buffer<ffi::S32> tables, ffi::RemainingArgs args, ffi::RemainingRets results,
               int32_t bits, float fine, int32_t activations, int32_t most) try {
  const Kernels& kernels = choose(most);
  const auto* table = reinterpret_cast<const uint32_t*>(tables.typed_data());
  const auto asked = calls(x, groups, args, results, 3);
  if (!asked) return invalid("a matrix lacks an array");
  for (const auto& [m, alike] : *asked) {
    std::vector<std::array<Points, 2>> matrices(alike.size());
    std::vector<Task> tasks(alike.size());
    for (size_t i = 0; i < alike.size(); ++i) {
      const Call& call = alike[i];
      auto found = scales(call.arrays[2]);
      if (!found) return invalid("scales must be float16, bfloat16 or float32");
      tasks[i] = {{}, call.y, call.n, 1, call.x};
      for (int part = 0; part < (bits == 2 ? 1 : 2); ++part) {
        const bool bytes = part == 1 && bits == 3;
        Points& points = matrices[i][part];
        points.form = bits != 3 && m == 1 ? kLattice : kInt4;
        points.codes = call.arrays[part].as<uint32_t>();
        points.rows = bytes ? table + 512 : table;
        points.signs = bytes ? nullptr : table + 256;
        points.n = call.n;
        points.kernels = &kernels;
        points.twice = bytes ? 0 : -1;
        points.scales = *found;
        points.scales.factor = part ? 0.5f * fine : 0.5f;
        tasks[i].operands.push_back(&points);
      }
    }
    const int64_t k = x.dimensions()[1];
    multiply(pool.num_threads(), kernels,
             {m, k, k, 8 * kOctet, 512, static_cast<Activations>(activations)}, tasks);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for an E8P product");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_e8p, jaxquant::e8p,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<float>("fine")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
