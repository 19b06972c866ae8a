"""What was measured, as tables for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from .measure import Measurement, quantiles

__all__ = ["describe", "table_of"]


def describe(measurement: Measurement) -> str:
    """Return the question of a measurement in words: model, mode and what differs from the default."""
    case, setting = measurement.case, measurement.case.setting
    words = [case.model.name, case.mode, str(setting.dtype).removeprefix("torch.")]
    if setting.order != "u_first":
        words.append(setting.order)
    if setting.n_power_iterations != 1:
        words.append(f"{setting.n_power_iterations} iterations")
    if not setting.training:
        words.append("evaluation")
    if case.passes != 1:
        words.append(f'{case.passes} passes, update="{setting.update}"')
    return ", ".join(words)


def table_of(measurements: Sequence[Measurement]) -> Table:
    """Return one case's table: times, and ours beside each of the others.

    GB/s is what must move at the least over the median: W in and Y out forward; G and Y in and gW out
    backward. Its share is of what ``copy_`` of the same weights moves in a second; it may pass 100 % where
    a cache serves one and not the other.
    """
    found = {each.provider: each for each in measurements}
    table = Table(title=describe(measurements[0]), title_justify="left")
    for column in ("", "ms", "20 to 80 %", "× ours", "GB/s", "of copy_", "of read", "error"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, each in found.items():
        _, low, high = quantiles(each.times)
        shares = [
            f"{each.gigabytes_per_second / found[other].gigabytes_per_second:.0%}"
            if other in found
            else ""
            for other in ("copy_", "read")
        ]
        ratio = f"{each.median / found['ours'].median:.2f}" if "ours" in found else ""
        error = "" if each.error is None else f"{each.error:.0e}"
        style = "bold" if name == "ours" else None
        times = (f"{each.median:.3f}", f"{low:.3f} to {high:.3f}")
        speed = f"{each.gigabytes_per_second:.1f}"
        table.add_row(name, *times, ratio, speed, *shares, error, style=style)
    return table
