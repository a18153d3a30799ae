"""Draw docs/figures/architecture.svg: python docs/figures/architecture.py."""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 1000
HEIGHT = 430
INK = "#1f2933"
SOFT = "#66727f"
# What a colour means: data, frozen or trained towers of Emu, objectives, and the decoder.
FILLS = {"data": "#e8eef7", "tower": "#dcefe3", "loss": "#fde9d2", "decoder": "#eee2f5"}


def box(x, y, w, h, kind, title, *lines):
    """A rounded box with a bold title and small lines below it."""
    out = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{FILLS[kind]}" '
        f'stroke="{INK}" stroke-width="1.2"/>'
    ]
    top = y + h / 2 - 9 * len(lines) + 5
    out.append(text(x + w / 2, top, title, size=15, weight="bold"))
    for number, line in enumerate(lines, 1):
        out.append(text(x + w / 2, top + 18 * number, line, size=12, fill=SOFT))
    return "\n".join(out)


def text(x, y, words, *, size=12, weight="normal", fill=INK, anchor="middle"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def arrow(*points, dashed=False):
    path = " L ".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="M {path}" fill="none" stroke="{INK}" stroke-width="1.5"{dash} '
        'marker-end="url(#head)"/>'
    )


def draw():
    """The whole figure as SVG text."""
    parts = [
        box(20, 40, 160, 80, "data", "Documents", "pairs, web pages,", "videos, conversations"),
        box(
            20, 180, 160, 70, "data", "Packed rows", "text and image slots,", "segments, positions"
        ),
        box(250, 40, 150, 80, "tower", "EVA-CLIP", "257 patch features", "of each image"),
        box(460, 40, 170, 80, "tower", "Causal resampler", "N = 32 visual tokens", "of each image"),
        box(460, 180, 170, 90, "tower", "LLaMA", "text and visual tokens,", "interleaved, causal"),
        box(250, 180, 150, 70, "tower", "Embedding", "of text tokens"),
        box(700, 40, 270, 80, "loss", "Next visual token", "L2 to the detached embedding"),
        box(
            700,
            185,
            270,
            80,
            "loss",
            "Next word",
            "cross-entropy, in chunks:",
            "no full-vocabulary logits",
        ),
        box(
            460,
            330,
            170,
            80,
            "decoder",
            "U-Net and VAE",
            "trained apart, on",
            "regressed embeddings",
        ),
        box(700, 330, 270, 80, "decoder", "Pixels", "a picture of what", "the LLaMA imagined"),
        arrow((100, 120), (100, 178)),
        arrow((180, 80), (248, 80)),
        arrow((400, 80), (458, 80)),
        arrow((180, 215), (248, 215)),
        arrow((400, 215), (458, 215)),
        arrow((545, 120), (545, 178)),
        arrow((630, 210), (665, 210), (665, 80), (698, 80)),
        arrow((630, 225), (698, 225)),
        arrow((545, 270), (545, 328)),
        arrow((630, 370), (698, 370)),
        arrow((835, 120), (835, 150), (645, 150), (645, 195), (632, 195), dashed=True),
        text(210, 70, "pixels"),
        text(215, 205, "ids"),
        text(838, 166, "drawing: each one is fed back", anchor="middle", fill=SOFT),
        text(556, 305, "visual tokens", anchor="start", fill=SOFT),
    ]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"
 font-family="Helvetica, Arial, sans-serif" role="img"
 aria-label="Data, encoder, resampler, LLaMA, objectives and decoder of Emu">
<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"
 orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{INK}"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
