"""Performance models of the kernels: rates from compiler schedules, and the limits of each chip."""
