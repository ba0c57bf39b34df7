"""The command ``fasa-edge inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fasa_edge import convert
from fasa_edge.cli.common import echo, force_option, json_option, plot_option, print_json, size_text
from fasa_edge.config import tip_bytes

import click
from tabulate import tabulate


@click.command(name="inspect")
@click.argument("file", type=click.Path(dir_okay=False))
@plot_option("Draw the chunks of every head.")
@force_option
@json_option
def command(file: str, plot: Path | None, force: bool, as_json: bool) -> None:
    """Show what FASA metadata FILE holds, an annotated model or a profile."""
    report = convert.inspect(file)
    if plot is not None:
        convert.write_plot(report, plot, force=force)
        echo(f"drawn: {plot}", err=True)
    if as_json:
        return print_json(report.to_dict())
    profile = report.profile
    files = f" in {report.n_files} files" if report.n_files > 1 else ""
    content = "a profile alone" if profile and not report.n_tensors else f"{report.n_tensors} tensors{files}"
    echo(f"{report.path}: {report.architecture}, {report.name or 'no name'}, {content}, {size_text(report.n_bytes)}")
    if profile is None:
        return echo(f"no FASA profile: make one with `fasa-edge convert {file}`")
    tips = f"{profile.n_tip}, {tip_bytes(profile.n_tip)} bytes per cell and KV head"
    settings = asdict(profile.config) | {"n_tip": tips}
    share = profile.calibration.clipped
    clipped = "unknown" if share is None else f"{share:.2%} of the tips' values"
    calibration = asdict(profile.calibration) | {"clipped": clipped}
    echo(tabulate([*settings.items(), *calibration.items(), ("fingerprint", profile.fingerprint)]))
    rows = [
        (il, ih, " ".join(map(str, chunks[: profile.n_tip])), f"{agreement[: profile.n_tip].sum():.3f}")
        for il, layer in enumerate(profile.chunks)
        for ih, (chunks, agreement) in enumerate(zip(layer, profile.agreement[il], strict=True))
    ]
    echo(tabulate(rows, headers=("layer", "KV head", "chunks, best first", f"sum of {profile.calibration.objective}")))
    lines = []
    for il, layer in enumerate(profile.chunks):
        for ih, chunks in enumerate(layer):
            centre, step = profile.centre[il][ih], profile.step[il][ih]
            chunk, ranges = convert.farthest(chunks, centre, step)
            far = f"{ranges:.1f} (chunk {chunk})" if ranges > 0 else ""
            lines.append((il, ih, convert.picture(chunks, step), f"{step.max():.3g}", far))
    echo("\nsteps of the tips by chunk, in tenths of the largest; -: the keys never move; centres in halves of a range")
    echo(tabulate(lines, headers=("layer", "KV head", "steps, by falling frequency", "largest", "farthest centre")))
