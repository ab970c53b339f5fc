"""Loading what was trained, and generating or classifying with it."""
