"""Let mkdocstrings find the public names of qface and read its docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, Module, Object

_ROLE = re.compile(r":\w+:`~?(?:qface\.)?([\w.]+)`")


class Docstrings(Extension):
    """Translation of docstrings to Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Translate Sphinx roles to links, and the section "Example" to the name that Griffe knows."""
        if obj.docstring:
            text = _ROLE.sub(r'<autoref identifier="qface.\1" optional>`\1`</autoref>', obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Point names such as ``qface.compress`` at the function where a module has the same name."""
        for name in map(str, pkg.exports or ()):
            member = pkg.members[name]
            if isinstance(member, Alias) and member.is_module:
                pkg.set_member(name, Alias(name, f"{member.target.canonical_path}.{name}", parent=pkg))
