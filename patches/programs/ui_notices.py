#!/usr/bin/env python3
"""Gather the licences of what the web UI has inside of npm's packages: ``ui_notices.py UI_SOURCES OUT``.

The bundler leaves no list. So these are the packages that the sources import, what these depend on, and what builds
leave in a page by themselves: more than is inside rather than less. Only the standard library is used.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
IMPORT = re.compile(r"""(?:\bfrom|\bimport|@import)\s*\(?\s*['"]((?:@[\w.-]+/)?[\w.-]+)""")
SOURCES = (".ts", ".js", ".svelte", ".css")
# the compiler's runtime, styles that every page gets, fonts by an alias
ALWAYS = ("svelte", "@sveltejs/kit", "tailwindcss", "katex")
# only its workbox-* goes into the page, of which there is one package each; the rest runs while it is built
BUILDS = ("vite-plugin-pwa", "@vite-pwa/sveltekit", "vitest", "vite", "@sveltejs/vite-plugin-svelte")


def imported(sources: Path) -> set[str]:
    """Names of packages that the sources import, and names that are no package's."""
    files = (path for path in sorted((sources / "src").rglob("*")) if path.suffix in SOURCES and path.is_file())
    return {name for path in files for name in IMPORT.findall(path.read_text("utf-8", "replace"))}


def with_dependencies(names: set[str], sources: Path) -> Iterator[Path]:
    """Folders of packages and of what they depend on, each once."""
    seen: set[Path] = set()
    waiting = [(sources, name) for name in sorted(names)]
    while waiting:
        where, name = waiting.pop(0)
        if name in BUILDS or name.startswith((".", "@types/")):
            continue
        # as node looks for it: beside who asks, then further up
        folders = [at / "node_modules" / name for at in (where, *where.parents) if at.name != "node_modules"]
        folder = next((found for found in folders if (found / "package.json").is_file()), None)
        if folder is None or folder in seen:  # optional, or a module of the build's own
            continue
        seen.add(folder)
        yield folder
        depends = json.loads((folder / "package.json").read_text("utf-8")).get("dependencies", {})
        waiting += [(folder, name) for name in sorted(depends)]


def notice(folder: Path) -> str:
    """Name, version and licence of a package, with the texts that it has."""
    package = json.loads((folder / "package.json").read_text("utf-8"))
    licence = package.get("license") or "see its texts"
    title = (
        f"{package['name']} {package.get('version', '')}: {licence if isinstance(licence, str) else licence['type']}"
    )
    author = package.get("author") or ""
    texts = [path.read_text("utf-8", "replace").strip() for path in sorted(folder.iterdir()) if is_licence(path)]
    if not texts:  # it says no more than this
        texts = [author if isinstance(author, str) else author.get("name", "")]
    return "\n\n".join([title, *filter(None, texts)])


def is_licence(path: Path) -> bool:
    """Whether a file is named as one with a licence."""
    return path.is_file() and bool(LICENCE.match(path.name)) and path.suffix not in (".js", ".ts", ".json")


def main() -> None:
    """Command line entry point."""
    sources, out = map(Path, sys.argv[1:])
    workbox = {path.name for path in (sources / "node_modules").glob("workbox-*")} - {"workbox-build"}
    names = imported(sources) | set(ALWAYS) | workbox
    notices = {notice(folder): None for folder in with_dependencies(names, sources)}
    copies = (path for path in sorted((sources / "src").rglob("*")) if is_licence(path))
    notices |= {f"{path.parent.name}\n\n{path.read_text('utf-8').strip()}": None for path in copies}
    line = f"\n\n{'-' * 80}\n\n"
    head = "The web UI inside fasa-llama-server is made of these packages, among others that only build it."
    out.write_text(line.join([head, *sorted(notices, key=str.lower)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
