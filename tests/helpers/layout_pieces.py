"""Layouts made by hand, for tests that need no model."""

import numpy as np
import torch

from hooked_mllm.families.geometry import even_cells, frame_ranges, grid_boxes, image_item, video_item
from hooked_mllm.layout import ImageMedia, TokenLayout, VideoMedia, View, VisualItem

PLACEHOLDER, TEXT = 9, 5


def image(width: int, height: int, cols: int, rows: int, index: int = 0) -> VisualItem:
    """An image seen by an even grid of tokens."""
    boxes = grid_boxes(even_cells(cols, width), even_cells(rows, height))
    return image_item(index, ImageMedia(width, height), [(View.WHOLE, boxes)])


def two_views(width: int, height: int, index: int = 0) -> VisualItem:
    """A coarse view of 2 x 2 tokens, then a fine one of 5 x 4 that misses a strip on the right, with newlines."""
    coarse = grid_boxes(even_cells(2, width), even_cells(2, height))
    cols = np.concatenate([even_cells(5, 0.8 * width), [[np.nan, np.nan]]])
    fine = grid_boxes(cols, even_cells(4, height))
    return image_item(index, ImageMedia(width, height), [(View.BASE, coarse), (View.HIGHRES, fine)])


def video(width: int, height: int, cols: int, rows: int, times: tuple, per_step: int = 1, index: int = 0) -> VisualItem:
    """A video seen by an even grid of tokens for every `per_step` frames, with a newline token at its end."""
    boxes = grid_boxes(even_cells(cols, width), even_cells(rows, height))
    media = VideoMedia(width, height, len(times), times)
    return video_item(index, media, boxes, frame_ranges(len(times), per_step), newlines=1)


def layout(*items: VisualItem, question: int = 3, answer: int = 0) -> TokenLayout:
    """Two template tokens, the items with a template token after each, a question, a template token, an answer."""
    ids = [TEXT] * 2
    for item in items:
        ids += [PLACEHOLDER] * len(item) + [TEXT]
    start = len(ids)
    ids += [TEXT] * (question + 1 + answer)
    spans = {"system": [(0, 1)], "question": [(start, start + question)]}
    if answer:
        spans["answer"] = [(len(ids) - answer, len(ids))]
    return TokenLayout.build(torch.tensor(ids), items, (PLACEHOLDER,), spans)
