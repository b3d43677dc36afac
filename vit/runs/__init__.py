"""What a run leaves and says: its folder, logs, curves, timing, card, and the tables of sweeps."""
