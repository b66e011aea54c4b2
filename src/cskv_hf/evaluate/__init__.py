"""What `cskv eval` does: benchmarks, methods, the paper's tables, and a suite that measures one on the other."""
