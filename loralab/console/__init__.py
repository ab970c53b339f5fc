"""Progress lines and tables for a terminal."""
