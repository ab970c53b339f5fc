"""Memory and FLOPs, measured and traced."""
