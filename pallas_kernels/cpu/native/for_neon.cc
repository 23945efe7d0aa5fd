// The products for NEON.
#if defined(__aarch64__)
#include <arm_neon.h>
#define NAME "neon"
#define NAMESPACE neon
#define LANES 4
#define TARGET
#define OPERATIONS "neon.h"
#include "instruction_set.h"
#endif
