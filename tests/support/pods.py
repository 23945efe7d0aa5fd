"""Plans of pods: what the tests check and the pages say."""

# Largest relative difference between the bytes of arguments of a plan and of its compiled program.
BYTES_WITHIN = 1e-4
