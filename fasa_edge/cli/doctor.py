"""The command ``fasa-edge doctor``."""

from __future__ import annotations

from dataclasses import asdict

from fasa_edge.cli.common import echo, json_option, print_json
from fasa_edge.runtime.doctor import examine

import click
from tabulate import tabulate


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> None:
    """Check the installation: library, commit, CPU features, backends, FASA."""
    report = asdict(examine())
    if as_json:
        return print_json(report)
    echo(tabulate(report.items()))
