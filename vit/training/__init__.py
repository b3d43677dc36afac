"""Training: the loop and what it works with. start.py alone knows the configuration."""
