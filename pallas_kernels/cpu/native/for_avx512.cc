// The products for AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>
#define NAME "avx512vnni"
#define NAMESPACE avx512vnni
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")))
#define OPERATIONS "avx512.h"
#include "instruction_set.h"
#endif
