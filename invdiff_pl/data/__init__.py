"""Data sets, their caches and their batches."""
