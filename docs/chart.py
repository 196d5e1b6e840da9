"""Draw the chart of the README from the figures in benchmarks.md: ``python docs/chart.py``."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent
FILE = DOCS / "img" / "step.svg"

_CONTENDERS = ("lora-fx", "PEFT")
_WIDTH, _HEIGHT, _LEFT, _BAR, _STEP = 640, 164, 70, 14, 22
_COLORS = {"lora-fx": "#19a38e", "PEFT": "#8a94ab"}
_SCALE = 440  # width of the longest bar of a group


def figures(page: str) -> dict[str, tuple[float, float]]:
    """Return relative time and saved MiB of a Llama step with dropout, by contender."""
    results = {}
    for name in _CONTENDERS:
        start = f"| cpu, float32 | {name}, p = 0.05 |"
        line = next(line for line in page.splitlines() if line.startswith(start))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        results[name] = float(cells[3].split()[0]), float(cells[5])
    return results


def draw(page: str) -> str:
    """Return the chart as SVG. Its gray is readable on light and on dark pages."""
    measured = figures(page)
    titles = (
        "memory kept for the backward pass, MiB beyond the frozen model",
        "time of a training step, relative to the frozen model",
    )
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
    style = 'font-family="sans-serif" font-size="12" fill="#808080"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>']
    y = 14
    for title, column in zip(titles, (1, 0), strict=True):
        lines.append(f'<text x="{_LEFT}" y="{y}" font-weight="bold">{title}</text>')
        most = max(values[column] for values in measured.values())
        for name, values in measured.items():
            y += _STEP
            width = _SCALE * values[column] / most
            box = f'x="{_LEFT}" y="{y - _BAR + 3}" width="{width:.1f}" height="{_BAR}"'
            lines += [
                f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{name}</text>',
                f'<rect {box} fill="{_COLORS[name]}"/>',
                f'<text x="{_LEFT + width + 6:.1f}" y="{y}">{values[column]:g}</text>',
            ]
        y += _STEP + 14
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw((DOCS / "benchmarks.md").read_text(encoding="utf-8")), encoding="utf-8")
