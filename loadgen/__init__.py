"""loadgen: seeded open-loop traffic against msd, with latencies that count from the intended send time.

    spec.toml --plan--> plan.jsonl[.gz] --run--> report.json and a table

Everything up to `plan` is pure (numpy and msgspec); only `send` and `targets` touch clocks and sockets. It reaches msd
through the words of the wire alone, and shares the exact-answer tasks with it.
"""
