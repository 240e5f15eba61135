"""Tables: rows of figures as aligned text."""


def table(rows: list[dict]) -> str:
    """Rows with equal keys as aligned text."""
    names = list(rows[0])
    lines = [names]
    for row in rows:
        lines.append([show_cell(row[name]) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = zip(line, widths, strict=True)
        shown.append("  ".join(cell.rjust(width) for cell, width in cells))
    return "\n".join(shown)


def show_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
