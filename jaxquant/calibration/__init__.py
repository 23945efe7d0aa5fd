"""Statistics of every matmul's input, as cotangents of probes."""
