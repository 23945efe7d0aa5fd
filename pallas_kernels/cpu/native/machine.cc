// Which of the compiled instruction sets this machine has.

#include <algorithm>
#include <vector>

#include "kernels.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace jaxquant {

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace avx512vbmi { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }
namespace dotprod { extern const Kernels kernels; }

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports does not know AVX-VNNI in all compilers: leaf 7, subleaf 1, bit 4 of eax.
bool has_avxvnni() {
  unsigned a = 7, b = 0, c = 1, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}
#endif

std::vector<const Kernels*> found() {
  std::vector<const Kernels*> sets = {&baseline::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  if (avx2) sets.push_back(&avx2::kernels);
  if (avx2 && has_avxvnni()) sets.push_back(&avxvnni::kernels);
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  if (avx512) sets.push_back(&avx512vnni::kernels);
  if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"))
    sets.push_back(&avx512vbmi::kernels);
#elif defined(__aarch64__)
  sets.push_back(&neon::kernels);
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & kDotProducts) sets.push_back(&dotprod::kernels);
#elif defined(__APPLE__)
  sets.push_back(&dotprod::kernels);  // all of Apple's have them
#endif
#endif
  return sets;
}

const std::vector<const Kernels*>& sets() {
  static const std::vector<const Kernels*> all = found();
  return all;
}

}  // namespace

const Kernels& choose(int most) {
  int last = static_cast<int>(sets().size()) - 1;
  return *sets()[most < 0 ? last : std::min(most, last)];
}

}  // namespace jaxquant

// The name of instruction set i of this machine, from the plainest on; null past the last.
extern "C" const char* jaxquant_instruction_set(int i) {
  auto& sets = jaxquant::sets();
  return i >= 0 && i < static_cast<int>(sets.size()) ? sets[i]->name : nullptr;
}
