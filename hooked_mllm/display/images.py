"""Images inside HTML, as part of the page."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image


def html_image(image: Image.Image, text: str, style: str = "", kind: str = "PNG") -> str:
    """An image (`kind` "PNG" or "JPEG") as part of the page; `text` is its alternative and its tooltip, `style` CSS."""
    file = BytesIO()
    image.save(file, kind, optimize=True)
    data = b64encode(file.getvalue()).decode()
    name = escape(text)
    styled = f' style="{escape(style)}"' if style else ""
    return f'<img alt="{name}" title="{name}" src="data:image/{kind.lower()};base64,{data}"{styled}>'


def html_thumbnails(
    images: Sequence[tuple[str, Image.Image]], side: int = 112, most: int = 4, most_bytes: int = 14_000
) -> str:
    """At most `most` named images of at most `side` pixels each way, while their HTML fits into `most_bytes`."""
    shown = ""
    for name, image in images[:most]:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        added = html_image(small, name, kind="JPEG")
        if len(shown) + len(added) > most_bytes:
            break
        shown += added
    return shown
