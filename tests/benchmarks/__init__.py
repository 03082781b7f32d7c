"""The service under load, against the bars of docs/reliability.md. By hand: `python -m tests.benchmarks --help`."""
