"""Finding an image, a video, or one of its views by number and name."""

from collections.abc import Sequence

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.items import View, VisualItem


def find_item(items: Sequence[VisualItem], image: int | None, video: int | None) -> int:
    """The place in `items` of an image or of a video.

    Raises:
        LayoutError: when neither or both are named, or there is no such one.
    """
    if (image is None) == (video is None):
        raise LayoutError(f"Name one image or one video; got image={image}, video={video}.")
    kind, index = ("image", image) if image is not None else ("video", video)
    if not items:
        raise LayoutError(f"This input has no visual tokens, so there is no {kind} {index}.")
    for number, item in enumerate(items):
        if (item.kind, item.index) == (kind, index):
            return number
    n = sum(item.kind == kind for item in items)
    have = f"{n} of them, numbered from 0" if n else "none"
    raise LayoutError(f"There is no {kind} {index}: this input has {have}.")


def find_view(item: VisualItem, view: str) -> View:
    """A view of an item by its name in small letters.

    Raises:
        LayoutError: when the item has no such view.
    """
    here = [v.name.lower() for v in View if v and (item.views == v).any()]
    if view not in here:
        raise LayoutError(f"{item.name} has no view {view!r}; it has {', '.join(here)}.")
    return View[view.upper()]
