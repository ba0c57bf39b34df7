"""Docstrings name objects as Sphinx does, :class:`Fasa`; the site shows them as code."""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(`[^`]+`)")


class Roles(Extension):
    """Takes the roles out of every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """One module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"\1", obj.docstring.value)
