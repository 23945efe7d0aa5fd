// The products for AVX-VNNI: 256-bit vectors with a byte dot product.
#if defined(__x86_64__)
#include <immintrin.h>
#define NAME "avxvnni"
#define NAMESPACE avxvnni
#define LANES 8
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define VNNI
#define OPERATIONS "avx2.h"
#include "instruction_set.h"
#endif
