"""What a run leaves and prints: its folder, logs, curves, timing, card, and tables of sweeps."""
