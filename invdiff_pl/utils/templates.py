"""Pages from the package's Jinja templates."""

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
    """Fill a template in; all values are escaped.

    Args:
        template: file in ``invdiff_pl/templates``.
        values: by the names that it uses.
    """
    return _ENVIRONMENT.get_template(template).render(**values)


def data_uri(picture: Image.Image) -> str:
    """A picture as the address of an ``img`` that needs no file.

    Example:
        >>> data_uri(Image.new("RGB", (8, 8)))[:23]
        'data:image/jpeg;base64,'
    """
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
