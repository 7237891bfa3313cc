"""Ways to run commands in a guest."""
