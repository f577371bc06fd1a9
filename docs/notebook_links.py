"""Rewrites the links of tutorials for the site: mkdocs rewrites those of Markdown pages, not those of notebooks."""

import logging
import posixpath
import re
from typing import Any

LOG = logging.getLogger("mkdocs.hooks.notebook_links")
_LINK = re.compile(r'href="(?![a-z][a-z0-9+.-]*:|[/#])([^"#?]+\.(?:md|ipynb))(?=["#?])', re.IGNORECASE)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for every page: a link from a notebook to a source file becomes a link to its page."""
    source = page.file
    if not source.src_uri.endswith(".ipynb"):
        return html

    def on_site(match: re.Match[str]) -> str:
        target = files.get_file_from_path(posixpath.normpath(posixpath.join(source.src_uri, "..", match[1])))
        if target is None:  # a warning ends a strict build
            LOG.warning("%s links to %s, which is no page of the manual: correct the link.", source.src_uri, match[1])
            return match[0]
        return f'href="{posixpath.relpath(target.url, source.url)}/'

    return _LINK.sub(on_site, html)
