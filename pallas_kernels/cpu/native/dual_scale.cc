// Products with integers that have a scale for each row and each column (pallas_kernels/
// dual_scale.py): each matrix meets x with its own steps in it, all of them in one call.

#include <new>
#include <vector>

#include "calls.h"
#include "packed.h"

namespace jaxquant {
namespace {

constexpr int kArrays = 5;  // of a matrix: codes, scale, step, ranges, escapes

struct Matrix {
  Packed packed;
  Escapes escapes;
  std::vector<float> x;  // times the steps
};

// Empty if an array is not what it should be. x: the rows of the call.
const char* fill(Matrix& to, const Call& call, const float* x, int64_t m, int64_t k, int bits) {
  const Array &codes = call.arrays[0], &scale = call.arrays[1], &step = call.arrays[2];
  const Array &ranges = call.arrays[3], &escapes = call.arrays[4];
  if (scale.type != ffi::F32 || step.type != ffi::F32) return "steps and scales must be float32";
  if (step.count != k || scale.count != call.n || ranges.count != 2 * call.n)
    return "steps, scales and ranges must be those of the rows and columns";
  to.packed.form = bits == 8 ? kInt8 : static_cast<Form>(kInt2 + bits - 2);
  to.packed.n = call.n;
  to.packed.codes = codes.as<uint32_t>();
  to.packed.scales = {scale.data, kSingle, call.n == 1};
  to.escapes = {escapes.as<int32_t>(), ranges.as<int32_t>(), escapes.count, scale.as<float>()};
  to.x.resize(m * k);
  const float* steps = step.as<float>();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < k; ++j) to.x[r * k + j] = x[r * k + j] * steps[j];
  return nullptr;
}

ffi::Error dual_scale(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
                      ffi::RemainingArgs args, ffi::RemainingRets results, int32_t bits,
                      int32_t activations, int32_t most) try {
  if (bits < 2 || (bits > 4 && bits != 8)) return invalid("bits must be 2, 3, 4 or 8");
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1];
  const Kernels& kernels = choose(most);
  const auto all = rounded(x.typed_data(), rows, k, static_cast<Activations>(activations), kernels);
  const auto asked = calls(x, groups, args, results, kArrays);
  if (!asked) return invalid("a matrix lacks an array");
  for (const auto& [m, alike] : *asked) {
    std::vector<Matrix> matrices(alike.size());
    std::vector<Task> tasks(alike.size());
    for (size_t i = 0; i < alike.size(); ++i) {
      const Call& call = alike[i];
      Matrix& matrix = matrices[i];
      const float* mine = all.data() + (call.x - x.typed_data());
      if (const char* why = fill(matrix, call, mine, m, k, bits)) return invalid(why);
      tasks[i] = {{&matrix.packed}, call.y, call.n, 1, matrix.x.data(), &matrix.escapes};
    }
    multiply(pool.num_threads(), kernels, {m, k, k, 128, 8192, kAsFloat}, tasks);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a packed product");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_dual_scale, jaxquant::dual_scale,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
