// The products in plain C++, for any machine.
#define NAME "baseline"
#define NAMESPACE baseline
#define LANES 4
#define TARGET
#define PLAIN
#define OPERATIONS "baseline.h"
#include "instruction_set.h"
