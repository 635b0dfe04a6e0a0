"""Just enough drawing for a picture that follows a slider: axes, curves, bars and text, as SVG.

A string of SVG needs no backend and is drawn in well under a millisecond, so a slider feels
continuous wherever ipywidgets runs. Figures that stand still are matplotlib's (`plots.py`).
"""

from collections.abc import Callable, Sequence
from html import escape

INK, GREY, PAPER = "#222222", "#7F7F7F", "#FFFFFF"
# Letters need more contrast than lines do: what a colour becomes where it colours a text.
DARKER = {
    GREY: "#666666", "#E69F00": "#8A5F00", "#009E73": "#00704F", "#D55E00": "#A84A00",
    "#0072B2": "#00619A",
}  # fmt: skip
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


class Panel:
    """One plot of a picture: maps data to pixels and collects what is drawn."""

    def __init__(self, box: tuple, x: tuple, y: tuple, title="", xlabel="", ylabel=""):
        """`box`: left, top, width and height in pixels; `x` and `y`: lowest and highest value."""
        self.left, self.top, self.width, self.height = box
        self.x, self.y = x, y
        right, bottom = self.left + self.width, self.top + self.height
        self.parts = [
            f"<path d='M{self.left},{self.top}V{bottom}H{right}' fill='none' stroke='{GREY}'/>",
            _text(self.left + self.width / 2, self.top - 10, title, 15, "middle", weight="bold"),
            _text(self.left + self.width / 2, bottom + 36, xlabel, 13, "middle"),
            _text(self.left - 40, self.top + self.height / 2, ylabel, 13, "middle", turn=-90),
        ]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies outside the axes is held at their edge."""
        across = min(1.0, max(0.0, (x - self.x[0]) / (self.x[1] - self.x[0])))
        up = min(1.0, max(0.0, (y - self.y[0]) / (self.y[1] - self.y[0])))
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def ticks(self, xs: Sequence = (), ys: Sequence = ()) -> "Panel":
        for value in xs:
            self.label(value, f"{value:g}")
        for value in ys:
            px, py = self.at(self.x[0], value)
            self.parts.append(_text(px - 6, py + 4, f"{value:g}", 12, "end", GREY))
        return self

    def label(self, x: float, text: str, lines: int = 1) -> "Panel":
        """Text beneath the bottom axis, `lines` lines down."""
        px, py = self.at(x, self.y[0])
        self.parts.append(_text(px, py + 18 * lines, text, 13, "middle"))
        return self

    def line(self, points: Sequence[tuple], colour: str, dash="", width=2.5) -> "Panel":
        path = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        self.parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}' "
            f"stroke-dasharray='{dash}'/>"
        )
        return self

    def curve(self, function: Callable, colour: str, dash="", width=2.5, n=120) -> "Panel":
        low, high = self.x
        xs = [low + (high - low) * i / n for i in range(n + 1)]
        return self.line([(x, function(x)) for x in xs], colour, dash, width)

    def dots(self, points: Sequence[tuple], colour: str, radius=5.0, opacity=1.0) -> "Panel":
        for point in points:
            px, py = self.at(*point)
            self.parts.append(
                f"<circle cx='{px:.1f}' cy='{py:.1f}' r='{radius}' fill='{colour}' "
                f"fill-opacity='{opacity}'/>"
            )
        return self

    def bar(self, x: float, y: float, width: float, colour: str) -> "Panel":
        """A bar from the bottom axis to `y`, `width` wide in units of x, centred on `x`."""
        (x0, y0), (x1, y1) = self.at(x - width / 2, self.y[0]), self.at(x + width / 2, y)
        self.parts.append(
            f"<rect x='{x0:.1f}' y='{y1:.1f}' width='{x1 - x0:.1f}' height='{y0 - y1:.1f}' "
            f"fill='{colour}'/>"
        )
        return self

    def note(self, x: float, y: float, text: str, colour=INK, anchor="start", size=13) -> "Panel":
        px, py = self.at(x, y)
        self.parts.append(_text(px, py, text, size, anchor, colour))
        return self


def _text(x, y, text, size, anchor="start", colour=INK, weight="normal", turn=0) -> str:
    rotate = f" transform='rotate({turn} {x:.1f} {y:.1f})'" if turn else ""
    colour = DARKER.get(colour, colour)
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='{colour}' "
        f"font-weight='{weight}' {FONT}{rotate}>{escape(text)}</text>"
    )


def picture(panels: Sequence[Panel], width=720, height=320, caption="") -> str:
    """The panels as one SVG on a white card, which reads well on light and on dark pages.

    `caption` says in words what the picture shows, for readers who hear rather than see it.
    """
    body = "".join(part for panel in panels for part in panel.parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"role='img' style='max-width:100%'><title>{escape(caption)}</title>"
        f"<rect width='{width}' height='{height}' rx='8' fill='{PAPER}'/>{body}</svg>"
    )


def small_multiples(pictures: Sequence[str], columns=2, width=720, height=320, gap=12) -> str:
    """Pictures of one size side by side, as one SVG: what a slider would show, standing still."""
    rows = -(-len(pictures) // columns)
    across, down = columns * (width + gap) - gap, rows * (height + gap) - gap
    placed = []
    for i, part in enumerate(pictures):
        x, y = i % columns * (width + gap), i // columns * (height + gap)
        place = f"<svg x='{x}' y='{y}' height='{height}' "  # without a height it is centred
        placed.append(part.replace("<svg ", place, 1))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {across} {down}' "
        f"width='{across}' role='img' style='max-width:100%;height:auto'>{''.join(placed)}</svg>"
    )
