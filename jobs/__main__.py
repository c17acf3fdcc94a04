"""`python -m jobs` lists all jobs, each with the first sentence on what it does."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

HERE = Path(__file__).parent


def jobs() -> dict[str, str]:
    """Name and first sentence of each module here that is a program."""
    found = {}
    for file in sorted(HERE.glob("*.py")):
        tree = ast.parse(file.read_text())
        doc = " ".join((ast.get_docstring(tree) or "").split())
        if file != Path(__file__) and _is_program(tree):
            sentence = doc.partition(". ")[0].rstrip(".:")
            found[file.stem] = textwrap.shorten(sentence, 100, placeholder=" …")
    return found


def _is_program(tree: ast.Module) -> bool:
    tests = [ast.unparse(part.test) for part in tree.body if isinstance(part, ast.If)]
    return "__name__ == '__main__'" in tests


def main() -> None:
    found = jobs()
    width = max(map(len, found))
    print("Usage: python -m jobs.NAME RECIPE [key=value …]; --help lists recipes and fields\n")
    for name, said in found.items():
        print(f"  {name:<{width}}  {said}")


if __name__ == "__main__":
    main()
