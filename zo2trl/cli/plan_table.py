"""Print the report of `zo2trl plan` as tables.

Does not: compute anything that `--json` does not print.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from zo2trl.files.sizes import format_bytes

__all__ = ["print_report"]

_TIERS = {"gpu": "device", "cpu": "host memory", "disk": "disk"}
_LINKS = {
    "up": "host memory to device", "down": "device to host memory", "disk_read": "read from disk",
    "disk_written": "written to disk",
}  # fmt: skip
_PEAKS = {
    "on the device": "device_peak_bytes", "pinned host memory": "pinned_peak_bytes",
    "the process": "host_peak_bytes", "unit files": "disk_peak_bytes",
}  # fmt: skip


def print_report(report: dict[str, Any]) -> None:
    """Print where units live, bytes, seconds, and what to change."""
    console = Console()
    console.print(
        f"{report['model']}: {report['parameters']:,} parameters, {report['trainable_parameters']:,} trained, "
        f"{report['tokens_per_step']:,} tokens a step, visited {report['granularity']} by {report['granularity']}",
        highlight=False, markup=False,
    )  # fmt: skip
    for table in (_places(report), _bytes(report), _seconds(report)):
        console.print(table)
    for line in _lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(*columns[:1], title_justify="left")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _places(report: dict[str, Any]) -> Table:
    table = _table("weights live", "units", "bytes", "written back")
    for tier, name in _TIERS.items():
        units = [unit for unit in report["units"] if unit["tier"] == tier]
        if units:
            every = report["write_back_every"][tier]
            write_schedule = (
                "never"
                if not report["trainable_parameters"]
                else f"every {every} steps"
                if every > 1
                else "every step"
            )
            table.add_row(
                name,
                str(len(units)),
                format_bytes(sum(u["bytes"] for u in units)),
                "" if tier == "gpu" else write_schedule,
            )
    table.add_row("ring and scratch", "", format_bytes(report["ring_bytes"] + report["scratch_bytes"]), "")
    return table


def _bytes(report: dict[str, Any]) -> Table:
    table = _table("bytes", "a step", "a run", "at most at once")
    written = report["disk_written_bytes_per_run"]
    for link, name in _LINKS.items():
        a_run = format_bytes(written) if link == "disk_written" and written is not None else ""
        table.add_row(name, format_bytes(report["bytes_per_step"][link]), a_run, "")
    first = report["disk_written_bytes_at_start"]
    if first and written is None:
        table.add_row("written before the first", "", format_bytes(first), "")
    for name, key in _PEAKS.items():
        table.add_row(name, "", "", format_bytes(report[key]))
    return table


def _seconds(report: dict[str, Any]) -> Table:
    table = _table("seconds", "a step")
    for name, seconds in (report["seconds"] or {}).items():
        table.add_row(name, f"{seconds:.3g}")
    step_s = report["seconds_per_step"]
    table.add_row("estimated step", "unknown" if step_s is None else f"{step_s:.3g}", style="bold")
    return table


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [_UNKNOWN] if report["machine"] is None else _time_lines(report)
    if not report["counted"]:
        lines.append("This model's forward looks at values, so its work was taken from the number of its weights.")
    return lines


_UNKNOWN = (
    "The step time is unknown, because this machine was not measured: leave out `--probe never`. Units are placed and "
    "written by fixed rules until then, here and in a training."
)


def _time_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"A step is bound by {report['bound']}: {report['tokens_per_second']:,.4g} tokens/s."]
    if report["seconds_per_run"] is not None:
        lines.append(f"The run takes about {report['seconds_per_run'] / 3600:.2g} hours.")
    if report["hiding_tokens_per_step"]:
        lines.append(f"Computing hides the transfer from {report['hiding_tokens_per_step']:,} tokens a step on.")
    advice = report["advice"]
    if advice is None:
        lines.append("No single option would make it faster by much.")
    else:
        lines.append(f"What would help most: {advice['option']} ({advice['gain']:.2f} x the tokens per second).")
        lines += _prices(advice, report)
    machine = report["machine"]
    flops = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in machine["flops"].items())
    basis = (
        f"of the {machine['name']} (`--probe again` measures this machine)"
        if machine["age_s"] is None
        else f"measured {_age(machine['age_s'])} ago (`--probe again`)"
    )
    lines.append(
        f"Rates {basis}: {flops}; up {format_bytes(machine['upload_bytes'])}/s, down "
        f"{format_bytes(machine['download_bytes'])}/s, disk {format_bytes(machine['disk_read_bytes'])}/s read and "
        f"{format_bytes(machine['disk_write_bytes'])}/s written."
    )
    return lines


def _prices(advice: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """Lines on what the advised option costs."""
    lines: list[str] = []
    first = advice["disk_written_bytes_at_start"]
    if first > report["disk_written_bytes_at_start"]:
        lines.append(f"It writes {format_bytes(first)} to `store_dir` before the first step, for weights on disk.")
    if advice["trains_16_bit"]:
        lines.append("In 16 bits, large weights do not feel a small `zo_eps`: see docs/tuning.md.")
    return lines


def _age(age_s: float) -> str:
    for name, seconds in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if age_s >= 2 * seconds:
            return f"{age_s / seconds:.0f} {name}"
    return f"{age_s:.0f} seconds"
