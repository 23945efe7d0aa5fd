// Products with integers that have a scale for each row and each column (pallas_kernels/
// dual_scale.py): each matrix meets x with its own steps in it, all of them in one call.

#include <new>
#include <vector>

#include "packed.h"

namespace jaxquant {
namespace {

constexpr int kArrays = 5;  // of a matrix: codes, scale, step, ranges, escapes

// x as `activations` says, in floats.
std::vector<float> rounded(const float* x, int64_t m, int64_t k, Activations activations,
                           const Kernels& kernels) {
  std::vector<float> found(x, x + m * k);
  if (activations == kAsFloat || activations == kCodes) return found;
  const int64_t size = activations == kInt8Rows ? k : kBlock;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t first = 0; first < k; first += size) {
      const int64_t at = r * k + first, count = std::min(size, k - first);
      const float scale = kernels.quantize(x + at, count, &found[at]);
      for (int64_t i = 0; i < count; ++i) found[at + i] *= scale;
    }
  return found;
}

struct Matrix {
  Packed packed;
  Escapes escapes;
  std::vector<float> x;  // times the steps
};

// Empty if an array is not what it should be.
const char* fill(Matrix& to, ffi::RemainingArgs& args, size_t i, const std::vector<float>& x,
                 int64_t m, int64_t k, int bits) {
  auto codes = args.get<ffi::Buffer<ffi::S32>>(kArrays * i);
  auto scale = args.get<ffi::Buffer<ffi::F32>>(kArrays * i + 1);
  auto step = args.get<ffi::Buffer<ffi::F32>>(kArrays * i + 2);
  auto ranges = args.get<ffi::Buffer<ffi::S32>>(kArrays * i + 3);
  auto escapes = args.get<ffi::Buffer<ffi::S32>>(kArrays * i + 4);
  if (!codes || !scale || !step || !ranges || !escapes) return "a matrix lacks an array";
  const int64_t n = codes->dimensions().back();
  if (static_cast<int64_t>(step->element_count()) != k ||
      static_cast<int64_t>(scale->element_count()) != n ||
      static_cast<int64_t>(ranges->element_count()) != 2 * n)
    return "steps, scales and ranges must be those of the rows and columns";
  to.packed.form = bits == 8 ? kInt8 : static_cast<Form>(kInt2 + bits - 2);
  to.packed.n = n;
  to.packed.codes = reinterpret_cast<const uint32_t*>(codes->typed_data());
  to.packed.scales = {scale->typed_data(), kSingle, n == 1};
  to.escapes = {escapes->typed_data(), ranges->typed_data(),
                static_cast<int64_t>(escapes->element_count()), scale->typed_data()};
  to.x.resize(m * k);
  const float* steps = step->typed_data();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < k; ++j) to.x[r * k + j] = x[r * k + j] * steps[j];
  return nullptr;
}

ffi::Error dual_scale(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                      ffi::RemainingRets results, int32_t bits, int32_t activations,
                      int32_t most) try {
  if (bits < 2 || (bits > 4 && bits != 8)) return invalid("bits must be 2, 3, 4 or 8");
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const Kernels& kernels = choose(most);
  const auto rows = rounded(x.typed_data(), m, k, static_cast<Activations>(activations), kernels);
  std::vector<Matrix> matrices(results.size());
  std::vector<Task> tasks(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    Matrix& matrix = matrices[i];
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!y) return invalid("results must be float32");
    if (const char* why = fill(matrix, args, i, rows, m, k, bits)) return invalid(why);
    tasks[i] = {{&matrix.packed}, (*y)->typed_data(), matrix.packed.n};
    tasks[i].x = matrix.x.data();
    tasks[i].escapes = &matrix.escapes;
  }
  multiply(pool.num_threads(), kernels, rows.data(), {m, k, k, 128, 8192, kAsFloat}, tasks);
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
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
