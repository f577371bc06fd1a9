"""The grid of visual tokens of an image."""

import numpy as np
import pytest

from helpers.layout_pieces import image, layout, two_views
from hooked_mllm.errors import LayoutError
from hooked_mllm.metrics.literature import token_grid


def test_token_grid():
    found = token_grid(layout(image(30, 20, 3, 2)))
    assert found.tolist() == [[2, 3, 4], [5, 6, 7]]
    views = layout(image(8, 8, 2, 2), two_views(40, 40, index=1))
    assert token_grid(views, image=1).shape == (2, 2)
    fine = token_grid(views, image=1, view="highres")
    assert fine.shape == (4, 5) and (np.diff(fine, axis=1) == 1).all() and (np.diff(fine[:, 0]) == 6).all()
    with pytest.raises(LayoutError):
        token_grid(views, image=2)
    with pytest.raises(LayoutError):
        token_grid(views, image=0, view="tile")
