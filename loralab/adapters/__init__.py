"""Adapters on disk and what they fit, whichever engine holds them."""
