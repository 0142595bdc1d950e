"""fused_gp against hand-written penalties and other packages: `make bench`, or `python -m benchmarks --help`."""
