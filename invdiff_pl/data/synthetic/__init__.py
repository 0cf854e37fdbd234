"""Rendered stand-ins in the file layouts of the published data sets."""
