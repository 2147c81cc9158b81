"""The checks of benchmarks/accept_gpu.py, part by part."""
