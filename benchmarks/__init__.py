"""fused_gp against hand-written penalties and other packages. From the checkout: `make bench`, `python -m benchmarks`."""
