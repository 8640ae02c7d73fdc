"""What the engine claims, measured: `python -m benchmarks [NAME...]`, then `python -m benchmarks table`."""
