"""FLOPs and memory of a program."""
