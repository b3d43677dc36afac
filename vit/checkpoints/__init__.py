"""Checkpoints: one safetensors file each, the model it holds, and those of a run."""
