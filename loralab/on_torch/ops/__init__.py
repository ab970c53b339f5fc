"""Linear maps, attention and dropout."""
