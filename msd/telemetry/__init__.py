"""ASIDE: reads the GPU and its energy counters. One module per source; each is a GpuProbe (msd/ports.py)."""
