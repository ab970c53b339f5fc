"""From folders to models."""
