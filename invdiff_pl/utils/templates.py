"""Rendering pages from the package's Jinja templates."""

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

_ENVIRONMENT = Environment(
    loader=PackageLoader("invdiff_pl", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill in a template; all values are escaped.

    Args:
        template: file in ``invdiff_pl/templates``.
        values: values by the names that the template uses.
    """
    return _ENVIRONMENT.get_template(template).render(**values)


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI, so that an ``img`` element needs no file.

    Example:
        >>> data_uri(Image.new("RGB", (8, 8)))[:23]
        'data:image/jpeg;base64,'
    """
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
