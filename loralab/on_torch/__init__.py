"""The PyTorch engine: LoRA's maths, the models, loading, training steps and generation."""
