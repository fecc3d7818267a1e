"""Training: what is learned from, where images come from, and the one loop of all stages."""
