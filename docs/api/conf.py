"""Sphinx: a page for each public name, made from its docstring. Built by `make docs`."""

import re
from typing import Any

import invdiff_pl

project = "InvDiff-PL"
version = release = invdiff_pl.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
html_theme = "furo"
html_show_copyright = False
html_copy_source = False

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
# Constructor arguments stand in the classes' own docstrings.
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _keep_last_underscore(*event: Any) -> None:
    """Names such as ``lambda_`` would be read as links, and lose it."""
    lines = event[-1]
    lines[:] = [re.sub(r"^:param (\w+)_:", r":param \1\\_:", line) for line in lines]


def setup(app: Any) -> None:
    """After napoleon."""
    app.connect("autodoc-process-docstring", _keep_last_underscore, priority=900)
