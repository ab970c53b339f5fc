"""LoRA for any JAX function."""
