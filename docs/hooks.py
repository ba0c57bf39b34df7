"""What mkdocs does besides: its site holds README.md and all that pages link to in the repository.

So a relative link serves both: on the site it leads to a page made of the file. A link to what does not exist stays as
it is, and mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FRONT = "README.md"
FOLDER = "repository"  # of the site, for what is not in docs/

_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def _target(page: str, link: str) -> str | None:
    """What a link in a page leads to, both as paths in the repository; None: nothing that is there."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def _uri(path: str) -> str:
    """Where the site has a path of the repository."""
    if path == FRONT:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def _path(uri: str) -> str:
    """The path in the repository of what the site has there, if it is written in Markdown."""
    return FRONT if uri == "index.md" else uri.removeprefix(f"{FOLDER}/") if uri.startswith(FOLDER) else f"docs/{uri}"


def _content(path: Path) -> str:
    """A page of a file or folder."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.is_dir():
        return title + "".join(f"- `{entry.name}`\n" for entry in sorted(path.iterdir()) if entry.is_file())
    return f"{title}````{path.suffix.removeprefix('.')}\n{path.read_text(encoding='utf-8')}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, and all that is linked to, from there on."""
    pending = [FRONT, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, _uri(path), content=_content(ROOT / path)))
        if path.endswith(".md"):
            links = _LINK.findall((ROOT / path).read_text(encoding="utf-8"))
            pending += filter(None, (_target(path, link) for link in links))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links at where the site has what they lead to in the repository."""
    uri = page.file.src_uri
    path = _path(uri)
    if not (ROOT / path).is_file():  # made of something else than Markdown
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = _target(path, match[0])
        return posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".") if target else match[0]

    return _LINK.sub(moved, markdown)
