"""Makes a site of these pages: the files beside docs/ that belong to it, and links to files that do not."""
from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that stand beside docs/.
BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand beside docs/."""
    from mkdocs.structure.files import File

    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def names_of(room: str) -> list[str]:
    """Return the public names of a room of the package, as its __init__ imports them, with the modules they are in."""
    tree = ast.parse((ROOT / "mindpet_lite" / room / "__init__.py").read_text(encoding="utf-8"))
    found = [(alias.name, f"{node.module}.{alias.name}") for node in tree.body if isinstance(node, ast.ImportFrom)
             and str(node.module).startswith("mindpet_lite.") for alias in node.names]
    return [path for _, path in sorted(found, key=lambda item: item[0].lower())]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """List the names of a room, and let links lead to pages of the site; of a file that is none, its name stays."""
    markdown = re.sub(r"^@names (\w+)$", lambda match: "\n\n".join(f"::: {path}" for path in names_of(match[1])),
                      markdown, flags=re.MULTILINE)
    beside = {"contributing.md", "changelog.md"}
    # Where the page's file is in the repository.
    here = "." if page.file.src_uri in beside else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def of_site(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(here, path))
        found = BESIDE.get(whole) or (whole.removeprefix("docs/") if whole.startswith("docs/") else None)
        if found is None or files.get_file_from_path(found) is None:
            return text if text.startswith("`") else f"{text} (`{whole}`)"
        own = posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({own}{'#' + anchor if anchor else ''})"

    return _LINK.sub(of_site, markdown)
