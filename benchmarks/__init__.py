"""`python -m benchmarks`: every op against the reference in plain PyTorch, torch.compile and torchvision."""

from benchmarks.run import quick_table

__all__ = ["quick_table"]
