// The products for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>
#define NAME "avx2"
#define NAMESPACE avx2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define OPERATIONS "avx2.h"
#include "instruction_set.h"
#endif
