// The products for NEON with the dot products of ARMv8.2.
#if defined(__aarch64__)
#include <arm_neon.h>
#define NAME "neon dotprod"
#define NAMESPACE dotprod
#define LANES 4
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define DOTPROD
#define OPERATIONS "neon.h"
#include "instruction_set.h"
#endif
