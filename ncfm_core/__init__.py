"""Dataset distillation in PyTorch: the numbers, and nothing of jobs, clusters or HTTP."""

__version__ = "0.1.0"
