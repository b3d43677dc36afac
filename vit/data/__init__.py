"""Data sets, their splits, the order of samples, and batches of decoded images."""
