"""The testbed: tiny Llama-architecture models with true answers, how they were trained, and their INT8 variants."""
