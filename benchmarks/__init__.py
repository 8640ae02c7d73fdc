"""What the engine claims, measured side by side: `python -m benchmarks [NAME...]`, then `python -m benchmarks table`."""
