"""What the server of processes.py imports once for all its children. Importing is all it may do: threads do not survive a fork."""
