"""LoRA in PyTorch."""
