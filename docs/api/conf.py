"""Sphinx: a page for each public name, made from its docstring. Built by `make docs`."""

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
