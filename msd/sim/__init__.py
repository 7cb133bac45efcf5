"""The same daemon in a virtual world: its own event loop, simulated engines and GPU, seeded chance, checks."""
