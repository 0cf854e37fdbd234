"""Packages the top-level ``experiments/`` inside ``invdiff_pl``; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["invdiff_pl*"]), "invdiff_pl.experiments"],
    package_dir={"invdiff_pl.experiments": "experiments"},
    package_data={
        "invdiff_pl": ["py.typed", "assets/**/*", "templates/*.html"],
        "invdiff_pl.experiments": ["**/*.yaml", "cluster/*.sh"],
    },
)
