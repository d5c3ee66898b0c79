"""Pages of the site that are made from the project when it is built (a hook of mkdocs).

- cli.md: the help of every command.
- examples/NAME.md: the scripts of examples/, a section for each cell.
- contributing.md, changelog.md: the files of the project's folder.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once it has collected the pages on disk."""
    pages = {
        "cli.md": cli_page(),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "changelog.md": root_page("CHANGELOG.md"),
        **{f"examples/{script.stem}.md": example_page(script) for script in sorted((ROOT / "examples").glob("*.py"))},
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def cli_page() -> str:
    """The help of every command, as argparse prints it."""
    from distillfss_core.cli.main import build_parser

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    parts = [
        "# Command line",
        "Every command has `--json` for scripts. An error is one line on stderr, `distillfss: error: ...`. The exit "
        "code is 0 after success, 1 after an error, 2 after a wrong option, and 130 after Ctrl-C.",
    ]
    for name, parser in commands(build_parser()):
        parts += [f"## {name}", f"```text\n{parser.format_help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command without commands of its own."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser.prog, parser
    for group in groups:
        for child in group.choices.values():
            yield from commands(child)


def example_page(script: Path) -> str:
    """A script with percent cells as prose and code."""
    text = script.read_text(encoding="utf-8")
    title, *cells = re.split(r"^# %% ?", text, flags=re.MULTILINE)
    parts = [f"# {script.stem.replace('_', ' ').capitalize()}", ast.get_docstring(ast.parse(title)) or ""]
    for cell in cells:
        prose, _, code = cell.partition("\n")
        parts += [prose, f"```python\n{code.strip()}\n```"]
    parts.append(f"The whole script is `examples/{script.name}`. The tests run it.")
    return "\n\n".join(parts) + "\n"


def root_page(name: str) -> str:
    """A page of the project's folder, with its links as they are from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](CHANGELOG.md", "](changelog.md")
    return text.replace("](CONTRIBUTING.md", "](contributing.md")
