"""Turns the roles in docstrings (``:func:`~steersman.envs.make```) into links of the built site."""

from __future__ import annotations

import html
import re

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>([^<]+)</code>")


def on_page_content(content: str, **_: object) -> str:
    """Replaces every role by its name, linked where the reference has a page for it."""
    return _ROLE.sub(_link, content)


def _link(match: re.Match[str]) -> str:
    target = html.unescape(match[1])
    name = target.lstrip("~")
    shown = name.rpartition(".")[2] if target.startswith("~") else name
    code = f"<code>{html.escape(shown)}</code>"
    # A link whose target is on no page stays plain code.
    return f'<autoref identifier="{html.escape(name)}" optional>{code}</autoref>' if "." in name else code
