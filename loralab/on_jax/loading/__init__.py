"""From folders to arrays."""
