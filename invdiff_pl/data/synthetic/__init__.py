"""Rendered stand-ins for published data sets, in the same file layouts."""
