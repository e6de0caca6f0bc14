"""Draw the pictures of the explanations: python docs/images/draw.py

Standard library only. Every mark is computed from the numbers below, and the same numbers give the same files.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

#: The levels of NF4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E, rounded.
NF4 = (-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1)

BLUE, ORANGE, GREEN, GREY = "#0b6e99", "#b5651d", "#4a7c3f", "#777777"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GREY, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashes}/>'


def text(x: float, y: float, words: str, colour: str = "#222222", size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def dot(x: float, y: float, colour: str, radius: float = 5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def curve(points: Sequence[tuple[float, float]], colour: str, *, closed: bool = False) -> str:
    path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points) + ("Z" if closed else "")
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def drawing(width: int, height: int, marks: Iterator[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, paper, *marks, "</svg>", ""])


def rounding() -> Iterator[str]:
    """Four weights on a line, and the codes that they get with 3 bits."""
    weights = (-0.82, -0.31, 0.12, 0.96)
    scale = max(abs(weight) for weight in weights) / 3

    def at(value: float) -> float:
        return 380 + 255 * value

    yield line(at(-1.4), 100, at(1.15), 100)
    for code in range(-4, 4):
        yield line(at(code * scale), 92, at(code * scale), 108, BLUE, 2)
        yield text(at(code * scale), 130, str(code), BLUE)
    for weight in weights:
        nearest = round(weight / scale) * scale
        yield dot(at(weight), 55, ORANGE)
        yield line(at(weight), 60, at(nearest), 92, ORANGE, 1.5)
        yield text(at(weight), 42, f"{weight:.2f}", ORANGE)
    yield text(380, 18, f"weights, and the codes of 3 bits with the scale {max(weights):.2f} / 3 = {scale:.2f}")
    yield text(380, 158, "code x scale is the weight that is stored; the error is at most half a scale", GREY)


def levels() -> Iterator[str]:
    """Evenly spaced levels and those of NF4, below a normal distribution whose largest weight is 2.5 sigma."""

    def at(value: float) -> float:
        return 350 + 290 * value

    bell = [(step / 100, math.exp(-((2.5 * step / 100) ** 2) / 2)) for step in range(-110, 111)]
    yield curve([(at(x), 150 - 110 * y) for x, y in bell], GREY)
    yield text(350, 24, "how often a weight has each value", GREY)
    for y, name, colour, values in (
        (185, "int4: evenly spaced", BLUE, [code / 7 for code in range(-8, 8)]),
        (245, "nf4: dense where weights are many", ORANGE, NF4),
    ):
        yield line(at(-1.16), y, at(1.05), y)
        for value in values:
            yield line(at(value), y - 8, at(value), y + 8, colour, 2)
        yield text(350, y + 28, name, colour)


def groups() -> Iterator[str]:
    """The same weight of 4 rows and 12 columns with three granularities; a colour is a scale."""
    colours = ("#9ecae1", "#fdd0a2", "#c7e9c0", "#dadaeb", "#fbb4b9", "#d9d9d9", "#ffe699", "#b3cde3")
    for number, (name, scale_of) in enumerate(
        (
            ("int8-tensor: 1 scale", lambda row, column: 0),
            ("int8: a scale for each row", lambda row, column: row),
            ("int4: a scale for each group", lambda row, column: row * 3 + column // 4),
        )
    ):
        left = 20 + 235 * number
        for row in range(4):
            for column in range(12):
                fill = colours[scale_of(row, column) % len(colours)]
                place = f'x="{left + 16 * column}" y="{45 + 22 * row}" width="15" height="20"'
                yield f'<rect {place} fill="{fill}"/>'
        yield text(left + 96, 30, name)
    yield text(352, 160, "rows are outputs, columns are inputs; weights of one colour share a scale", GREY)


#: Two weights of a row, in units of the scale, and the second moment of their inputs: both are large at the same time.
WEIGHT, MOMENT = (0.46, 0.36), ((1.0, 0.9), (0.9, 1.0))


def output_error(q: tuple[float, float]) -> float:
    """The mean square of the output's error, (w - q) H (w - q)^T."""
    a, b = WEIGHT[0] - q[0], WEIGHT[1] - q[1]
    return a * a * MOMENT[0][0] + 2 * a * b * MOMENT[0][1] + b * b * MOMENT[1][1]


CODES = [(float(a), float(b)) for a in range(-1, 3) for b in range(-1, 3)]
NEAREST = min(CODES, key=lambda q: math.dist(q, WEIGHT))
BEST = min(CODES, key=output_error)


def ellipse(error: float) -> list[tuple[float, float]]:
    """The points whose output has this error."""
    found = []
    for degree in range(360):
        x, y = math.cos(math.radians(degree)), math.sin(math.radians(degree))
        reach = math.sqrt(error / (x * x * MOMENT[0][0] + 2 * x * y * MOMENT[0][1] + y * y * MOMENT[1][1]))
        found.append((WEIGHT[0] + reach * x, WEIGHT[1] + reach * y))
    return found


def lattice() -> Iterator[str]:
    """Two weights: the nearest codes, and the codes with the least error of the output."""

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return 270 + 110 * point[0], 275 - 110 * point[1]

    for code in CODES:
        yield dot(*at(code), "#bbbbbb", 4)
    for error in (output_error(BEST), output_error(NEAREST)):
        yield curve([at(point) for point in ellipse(error)], GREY, closed=True)
    yield line(*at(WEIGHT), *at(NEAREST), ORANGE, 2)
    yield line(*at(WEIGHT), *at(BEST), BLUE, 2)
    yield dot(*at(WEIGHT), GREEN, 6)
    yield dot(*at(NEAREST), ORANGE, 6)
    yield dot(*at(BEST), BLUE, 6)
    yield text(200, 423, "across: codes of one weight; up: codes of the other", GREY, 12)
    for y, colour, words in (
        (60, GREEN, "the two weights"),
        (90, ORANGE, f"nearest codes: distance {math.dist(NEAREST, WEIGHT):.2f}, error {output_error(NEAREST):.2f}"),
        (120, BLUE, f"chosen codes: distance {math.dist(BEST, WEIGHT):.2f}, error {output_error(BEST):.2f}"),
        (150, GREY, "points on an ellipse have the same error of the output"),
    ):
        yield dot(520, y - 4, colour, 5)
        yield text(535, y, words, colour, anchor="start")


PICTURES = {
    "rounding": (760, 175, rounding),
    "levels": (700, 290, levels),
    "groups": (705, 175, groups),
    "lattice": (950, 430, lattice),
}


def main(folder: Path) -> None:
    """Write every picture to a folder."""
    for name, (width, height, marks) in PICTURES.items():
        (folder / f"{name}.svg").write_text(drawing(width, height, marks()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
