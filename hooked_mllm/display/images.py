"""Images inside HTML, as part of the page."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image


def html_image(image: Image.Image, text: str, style: str = "", kind: str = "PNG") -> str:
    """An image as part of the page.

    Args:
        image: The image.
        text: What is shown where images are not, and under the pointer.
        style: CSS of it.
        kind: "PNG" or "JPEG".

    Examples:
        >>> html_image(Image.new("RGB", (2, 2)), "black").partition(";")[0]
        '<img alt="black" title="black" src="data:image/png'
    """
    file = BytesIO()
    image.save(file, kind, optimize=True)
    data = b64encode(file.getvalue()).decode()
    name = escape(text)
    styled = f' style="{escape(style)}"' if style else ""
    return f'<img alt="{name}" title="{name}" src="data:image/{kind.lower()};base64,{data}"{styled}>'


def html_thumbnails(
    images: Sequence[tuple[str, Image.Image]], side: int = 112, most: int = 4, most_bytes: int = 14_000
) -> str:
    """Small copies of images, as many as fit.

    Args:
        images: Each with its name.
        side: The longest side in pixels.
        most: The largest number of images shown.
        most_bytes: The largest number of bytes of all of them, as HTML.
    """
    shown = ""
    for name, image in images[:most]:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        added = html_image(small, name, kind="JPEG")
        if len(shown) + len(added) > most_bytes:
            break
        shown += added
    return shown
