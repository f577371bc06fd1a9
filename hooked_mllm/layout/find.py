"""Look up an image, a video, or one of its views by number and name."""

from collections.abc import Sequence

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.items import View, VisualItem


def find_item(items: Sequence[VisualItem], image: int | None, video: int | None) -> int:
    """The index in `items` of an image or of a video."""
    if (image is None) == (video is None):
        raise LayoutError(f"Name one image or one video; got image={image}, video={video}.")
    kind, index = ("image", image) if image is not None else ("video", video)
    if not items:
        raise LayoutError(f"This input has no visual tokens, so there is no {kind} {index}.")
    for number, item in enumerate(items):
        if (item.kind, item.index) == (kind, index):
            return number
    n = sum(item.kind == kind for item in items)
    available = f"{n} of them, numbered from 0" if n else "none"
    raise LayoutError(f"There is no {kind} {index}: this input has {available}.")


def find_view(item: VisualItem, view: str) -> View:
    """A view of an item by its lower-case name."""
    available = [v.name.lower() for v in View if v and (item.views == v).any()]
    if view not in available:
        raise LayoutError(f"{item.name} has no view {view!r}; it has {', '.join(available)}.")
    return View[view.upper()]
