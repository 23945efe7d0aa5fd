// Trellis codes: tiles of 16 x 16 weights, decoded a vector of tiles at a time.
//
// Lane by lane the tiles run through the same steps, so every shift is one for all lanes. Decoded
// columns lie [column of the tile, lane]; the driver puts the sums back in order.

#include <algorithm>
#include <cstring>
#include <new>

#include "calls.h"

namespace jaxquant {
namespace {

constexpr int kSide = 16;
constexpr int kMostLanes = 16;
constexpr int kMostFused = 4;  // bits of a weight, of the tiles in tiles.h

class Tiles : public Operand {
 public:
  const uint32_t* codes;  // [words, tiles]
  int64_t tiles, rows_per_group;
  ffi::Span<const int32_t> rates;
  std::vector<int64_t> starts;  // first word of each group
  TrellisCode code;
  const Kernels* kernels;

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    const int rate = rates[s.group], lanes = kernels->lanes;
    if (form == kByteSums) {
      const int64_t row = starts[s.group] + 8 * rate * ((s.begin - s.group * rows_per_group) / kSide);
      return in_rows(codes, tiles, row, 8 * rate * s.units, first / kSide, count / kSide,
                     columns / kSide, room);
    }
    auto* out = reinterpret_cast<float*>(room);
    if (rate == 0) {
      std::fill_n(out, s.units * columns, 0.0f);
      return {room, columns};
    }
    const int64_t last = (first + count) / kSide;
    for (int64_t row = s.begin; row < s.end; row += kSide) {
      const int64_t down = (row - s.group * rows_per_group) / kSide;
      const uint32_t* from = codes + (starts[s.group] + 8 * rate * down) * tiles;
      for (int64_t column = 0; column < columns; column += kSide * lanes) {
        const int64_t tile = (first + column) / kSide;
        alignas(64) uint32_t words[(8 * 8 + 1) * kMostLanes];
        gather(from + tile, 8 * rate, std::clamp<int64_t>(last - tile, 0, lanes), words);
        kernels->trellis({words, rate, &code, out + (row - s.begin) * columns + column, columns});
      }
    }
    return {room, columns};
  }

  int rate(int64_t group) const override { return rates[group]; }

 private:
  // The streams of some tiles side by side, the first word again at the end.
  void gather(const uint32_t* from, int count, int64_t some, uint32_t* words) const {
    const int lanes = kernels->lanes;
    if (some == lanes && lanes % 8 == 0) {  // all, of a size that is known
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < lanes; j += 8)
          std::memcpy(words + i * lanes + j, from + i * tiles + j, 8 * sizeof(uint32_t));
    } else {
      std::fill_n(words, (count + 1) * lanes, 0u);
      for (int i = 0; i < count; ++i)
        std::memcpy(words + i * lanes, from + i * tiles, some * sizeof(uint32_t));
    }
    std::memcpy(words + count * lanes, words, lanes * sizeof(uint32_t));
  }
};

// table: float32 [states, weights], the code's; empty: a weight is `unit` times the sum of the
// bytes of factor * state + term, less 510. Of every matrix: codes, scale.
ffi::Error trellis(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
                   ffi::Buffer<ffi::F32> table, ffi::RemainingArgs args,
                   ffi::RemainingRets results, ffi::Span<const int32_t> rates, int32_t L,
                   int32_t weights, int32_t factor, int32_t term, float unit, int32_t activations,
                   int32_t most) try {
  const Kernels& kernels = choose(most);
  const int64_t k = x.dimensions()[1], group = k / static_cast<int64_t>(rates.size());
  if (group % kSide) return invalid("blocks of rows must be multiples of 16");
  const float* values = table.element_count() ? table.typed_data() : nullptr;
  const bool narrow = *std::max_element(rates.begin(), rates.end()) <= kMostFused;
  const auto asked = calls(x, groups, args, results, 2);
  if (!asked) return invalid("a matrix lacks an array");
  for (const auto& [m, alike] : *asked) {
    const bool fused = !values && m < kManyRows && narrow;
    std::vector<Tiles> matrices(alike.size());
    std::vector<Task> tasks(alike.size());
    for (size_t i = 0; i < alike.size(); ++i) {
      const Call& call = alike[i];
      auto found = scales(call.arrays[1]);
      if (!found) return invalid("scales must be float16, bfloat16 or float32");
      Tiles& tiles = matrices[i];
      tiles.form = fused ? kByteSums : kFloat32;
      tiles.scales = *found;
      tiles.codes = call.arrays[0].as<uint32_t>();
      tiles.tiles = call.n / kSide;
      tiles.rows_per_group = group;
      tiles.rates = rates;
      for (int64_t start = 0, g = 0; g < static_cast<int64_t>(rates.size()); ++g) {
        tiles.starts.push_back(start);
        start += 8 * rates[g] * (group / kSide);
      }
      tiles.code = {L, weights, static_cast<uint32_t>(factor), static_cast<uint32_t>(term), values};
      tiles.trellis = &tiles.code;
      if (!values) tiles.scales.factor = unit;
      tiles.kernels = &kernels;
      tasks[i] = {{&tiles}, call.y, call.n, kSide, call.x};
    }
    multiply(pool.num_threads(), kernels,
             {m, k, group, (fused ? 4 : 2) * kSide, fused ? 2048 : 256,
              static_cast<Activations>(activations)}, tasks);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a trellis product");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_trellis, jaxquant::trellis,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int32_t>>("rates")
                                  .Attr<int32_t>("L")
                                  .Attr<int32_t>("weights")
                                  .Attr<int32_t>("factor")
                                  .Attr<int32_t>("term")
                                  .Attr<float>("unit")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
