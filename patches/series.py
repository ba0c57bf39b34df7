#!/usr/bin/env python3
"""Work on the patch series with git: a repository with one commit for each patch, and back.

    python patches/series.py tree DIR       the pinned llama.cpp (tag `stock`) and a commit for each patch on top of it,
                                            with our own files linked in, so that an edit there is an edit here
    python patches/series.py refresh DIR    write the commits since `stock` as patches/NNNN-*.patch, which are mails
    python patches/series.py rebase DIR     carry the commits over to the llama.cpp that upstream.txt pins by now

Before `refresh`, `git commit --amend`, `git rebase -i stock`, a new commit for a new patch. Author, date and message of
a commit are the head of a patch, and the message's first line its name.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from prepare import PATCHES, STAMP, PrepareError, own_files, patch_series, prepare, run_git

BASE = "stock"  # the tag of the pinned llama.cpp as it is
BRANCH = "series"


def git(tree: Path, *arguments: str) -> str:
    """What git prints, or its refusal."""
    done = run_git(tree, *arguments)
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).splitlines())
        raise PrepareError(f"git {' '.join(arguments)}, in {tree}:\n{said}")
    return done.stdout


def commit_stock(tree: Path) -> None:
    """Commit what the folder holds as the pinned llama.cpp."""
    # They come before .git/info/exclude: tools/ui/src has one by which our links there would be part of a commit.
    for ignore in tree.rglob(".gitignore"):
        ignore.unlink()
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--allow-empty", "--message=llama.cpp as it is")
    git(tree, "tag", "--force", BASE)


def make_tree(tree: Path) -> None:
    """Make the repository in a new or empty folder."""
    if tree.exists() and any(tree.iterdir()):
        raise PrepareError(f"{tree} is not empty\n  remedy: name another folder, or remove it if nothing is lost")
    prepare(tree, stock=True)
    links = own_files()
    git(tree, "init", "--quiet", f"--initial-branch={BRANCH}")
    # of what is committed here anew: the name in LICENSE
    git(tree, "config", "user.name", "The fasa-edge authors")
    git(tree, "config", "user.email", "fasa-edge@localhost")
    (tree / ".git/info/exclude").write_text("".join(f"/{name}\n" for name in (STAMP, *sorted(links))), encoding="utf-8")
    commit_stock(tree)

    for name, source in links.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(source)
    if series := patch_series():
        git(tree, "am", "--quiet", "--keep-cr", *map(str, series))


def check_tree(tree: Path) -> None:
    """Refuse a folder that is not the repository, or where the branch does not hold all of the work."""
    if not (tree / ".git").is_dir():
        raise PrepareError(f"{tree} is no repository\n  remedy: make one with `make patches-tree`")
    if changes := git(tree, "status", "--porcelain"):
        raise PrepareError(
            f"{tree} has changes that no commit holds:\n{changes}"
            "  remedy: commit or amend; a file of our own belongs into patches/overlay or ggml_kernels instead"
        )
    if git(tree, "branch", "--show-current").strip() != BRANCH:
        raise PrepareError(
            f"{tree}: a rebase is under way, or another branch is checked out than {BRANCH}\n"
            f"  remedy: `git rebase --continue` or `git switch {BRANCH}` there"
        )


def rebase(tree: Path) -> None:
    """Move the series' commits from the llama.cpp of the tree to the one that is pinned now, by three-way merges."""
    check_tree(tree)
    old = git(tree, "rev-parse", f"{BASE}^{{commit}}").strip()
    with tempfile.TemporaryDirectory(prefix=f"{tree.name}.", dir=tree.parent) as work:
        stock = Path(work) / "stock"
        prepare(stock, stock=True)
        git(tree, "checkout", "--quiet", "--detach", BASE)
        git(tree, "rm", "-r", "--quiet", ".")
        shutil.copytree(stock, tree, dirs_exist_ok=True)
    commit_stock(tree)
    git(tree, "rebase", "--quiet", "--onto", BASE, old, BRANCH)


def refresh(tree: Path) -> list[str]:
    """Write the commits of the tree as the series; the names of the patches that changed."""
    check_tree(tree)
    with tempfile.TemporaryDirectory(prefix="series.", dir=PATCHES) as work:
        for number, commit in enumerate(git(tree, "rev-list", "--reverse", f"{BASE}..HEAD").split(), 1):
            # Nothing that differs from one machine or day to the next: no hash of the commit, no version of git. And
            # nothing that one patch more would change: no "1/10".
            options = ("--zero-commit", "--no-signature", "--no-numbered", "--no-stat")
            options = (*options, "--unified=3", "--abbrev=9", "--no-renames", "--no-color")
            options = (*options, f"--start-number={number}", f"--output-directory={work}")
            mail = Path(git(tree, "format-patch", "-1", *options, commit).strip())
            mail.rename(mail.with_name(mail.name.lower()))

        series = {path.name: path for path in Path(work).iterdir()}
        before = {path.name: path for path in patch_series()}
        kept = filecmp.cmpfiles(work, PATCHES, series.keys() & before.keys(), shallow=False)[0]
        changed = sorted((series.keys() | before.keys()) - set(kept))
        for name in changed:
            if name in series:
                series[name].rename(PATCHES / name)
            else:
                before[name].unlink()
    return changed


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Work on the patch series in a git repository.")
    parser.add_argument("task", choices=("tree", "refresh", "rebase"))
    parser.add_argument("tree", type=Path, metavar="DIR")
    args = parser.parse_args()
    tree = args.tree.resolve()
    try:
        if args.task == "tree":
            make_tree(tree)
            print(f"series: {tree} holds a commit for each patch since the tag {BASE}")
        elif args.task == "rebase":
            rebase(tree)
            print(f"series: {tree} holds the series on the llama.cpp that is pinned now")
        else:
            print("series:", ", ".join(refresh(tree)) or "no patch changed")
    except PrepareError as error:
        print(f"series: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
