"""Layouts of users' own data sets: tables, caption files and class folders."""

from invdiff_pl.data.layouts.listing import Listing, Reading, read_listings

__all__ = ["Listing", "Reading", "read_listings"]
