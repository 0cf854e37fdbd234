"""A run folder: its stages, when one is due, records and digests, verify and replay."""
