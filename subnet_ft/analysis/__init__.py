"""Numbers about masks and runs."""
