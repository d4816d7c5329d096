"""What runs in the forked child. Nothing here is ever called in the host."""
