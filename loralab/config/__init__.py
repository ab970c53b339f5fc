"""The recipe: its blocks, how it is loaded, and its optional extras."""
