"""Filling in the templates of the report."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_ENVIRONMENT = Environment(
    loader=PackageLoader("tlora_mlx.reporting", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> Markup:
    """Fill in a template.

    Args:
        template: the name of a file in ``templates/``.
        values: the template's variables. Everything is escaped, except for the result of another
            call of this function.

    Returns:
        HTML or SVG, safe to insert into another template.

    Raises:
        jinja2.UndefinedError: the template uses a value that was not given.
    """
    text = _ENVIRONMENT.get_template(template).render(values)
    # MarkupSafe writes a quotation mark as &#34;. Ampersands in the values are themselves escaped,
    # so this changes nothing else.
    return Markup(text.replace("&#34;", "&quot;"))
