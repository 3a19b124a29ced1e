"""For the API reference: comments behind fields, with shapes and units, as their docstrings."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    def on_attribute_instance(
        self, *, node: ast.AST, attr: griffe.Attribute, agent: Any, **kwargs: Any
    ) -> None:
        if attr.docstring is not None or attr.parent is None or not attr.parent.is_class:
            return
        if not isinstance(node, ast.AnnAssign) or node.end_lineno is None:
            return
        line = agent.code.splitlines()[node.end_lineno - 1]
        _, found, comment = line.encode()[node.end_col_offset :].decode().partition("#")
        if found:
            attr.docstring = griffe.Docstring(comment.strip(), parent=attr)
