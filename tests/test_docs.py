"""The documentation holds for the code: commands parse, Python compiles, every public name has its entry."""

import importlib.util
import re
import shlex

import pytest

import distillfss_core


def pages(root):
    return sorted((root / "docs").rglob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_every_command_of_every_page_parses(root):
    from distillfss_core.cli.main import build_parser

    parsed = 0
    for page in pages(root):
        lines = "\n".join(blocks(page.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ").splitlines()
        for line in lines:
            if line.startswith("distillfss "):
                try:
                    build_parser().parse_args(shlex.split(line, comments=True)[1:])
                except SystemExit:
                    pytest.fail(f"{page.name} has: {line}")
                parsed += 1
    assert parsed > 20


def test_the_python_of_every_page_compiles(root):
    for page in pages(root):
        for code in blocks(page.read_text(encoding="utf-8"), "python"):
            compile(code, page.name, "exec")


def test_every_public_name_has_an_entry_in_the_reference(root):
    reference = (root / "docs" / "reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: distillfss_core\.(\w+)$", reference, flags=re.MULTILINE)
    assert sorted(entries) == sorted(distillfss_core.__all__)


def test_links_between_pages_lead_somewhere(root):
    made = ("cli.md", "contributing.md", "changelog.md", "examples/")  # by docs/site_pages.py
    for page in [*pages(root), root / "README.md", root / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http", *made)):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_pages_that_the_site_makes_have_every_command_and_example(root):
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("site_pages", root / "docs" / "site_pages.py")
    site_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site_pages)
    page = site_pages.cli_page()
    names = ("distill", "segment", "batch", "instances", "export", "import", "evaluate", "info", "bench accuracy")
    for command in names:
        assert f"## distillfss {command}\n" in page
    for script in (root / "examples").glob("*.py"):
        text = site_pages.example_page(script)
        assert text.count("```python") == script.read_text(encoding="utf-8").count("\n# %%")
