"""The options of one call of a processor: those of the call over the processor's own, as transformers merges them."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from hooked_mllm.errors import InputError
from hooked_mllm.inputs.video import DEFAULT_MAX_FRAMES, Number, check_sampling

#: parts of a processor by the name of their options
PARTS = {"text_kwargs": "tokenizer", "images_kwargs": "image_processor", "videos_kwargs": "video_processor"}
#: options that video processors declare and read from themselves only, so that a call would not change them
_FIXED = ("min_frames", "max_video_tokens")


def declared_options(processor: object) -> set[str]:
    """The keywords that a processor takes, its own and those of its parts; none if it declares none."""
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", None)
    if not declared:
        return set()
    known = {*declared, "common_kwargs"}
    for kind, part in PARTS.items():
        own = getattr(getattr(processor, part, None), "valid_kwargs", None)
        for keywords in (declared.get(kind), own):
            known |= set(getattr(keywords, "__annotations__", ()))
    return known


def merged_options(processor: Any, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that a call gives to text, images and videos, by "text_kwargs" and so on."""
    if not declared_options(processor):
        return {kind: dict(options) for kind in PARTS}
    try:
        merged = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **options
        )
    except Exception as error:  # transformers validates options with huggingface_hub, whose errors differ by version
        raise InputError(f"{type(processor).__name__} rejects these options: {error}") from error
    fixed = [name for name in _FIXED if name in merged["videos_kwargs"]]
    if fixed:
        raise InputError(f"{fixed[0]} has no effect in a call: set processor.video_processor.{fixed[0]} instead.")
    return {kind: dict(merged[kind]) for kind in PARTS}


def processor_in_effect(processor: object, merged: Mapping[str, Mapping[str, Any]]) -> SimpleNamespace:
    """The image and the video processor with the options of a call in place of their own."""
    parts = {}
    for kind, name in (("images_kwargs", "image_processor"), ("videos_kwargs", "video_processor")):
        part = getattr(processor, name, None)
        own = getattr(getattr(part, "valid_kwargs", None), "__annotations__", None) or getattr(part, "__dict__", {})
        parts[name] = SimpleNamespace(**{option: getattr(part, option, None) for option in own} | dict(merged[kind]))
    return SimpleNamespace(**parts)


def frame_sampler(
    video_processor: Any,
    options: Mapping[str, Any],
    fps: Number | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
) -> Callable[[int, float], np.ndarray] | None:
    """The frames of a file that a video processor takes, by their number and rate; None if it has no `sample_frames`.

    A processor that does not sample, which is the default of LLaVA-OneVision and InternVL, takes all frames. `options`
    are those of the call for videos, `do_sample_frames` in effect among them.
    """
    own = getattr(video_processor, "sample_frames", None)
    if own is None:
        return None
    if fps is None and num_frames is None:
        fps, num_frames = options.get("fps"), options.get("num_frames")
    max_frames = options.get("max_frames") if max_frames is None else max_frames
    check_sampling(fps, num_frames, max_frames)
    names = {"fps", "num_frames", "max_frames", "metadata", "video_metadata", "return_tensors"}
    others = {name: value for name, value in options.items() if name not in names}

    def sample(total: int, rate: float) -> np.ndarray:
        def indices(**count: Any) -> np.ndarray:
            try:
                return np.asarray(own(metadata=VideoMetadata(total_num_frames=total, fps=rate), **count, **others))
            except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
                how = ", ".join(f"{name}={value}" for name, value in count.items()) or "neither fps= nor num_frames="
                raise InputError(
                    f"{type(video_processor).__name__} cannot sample {total} frames at {rate:g} a second with {how}: "
                    f"{error}"
                ) from error

        if num_frames is not None:
            index = indices(num_frames=min(num_frames, total))
        elif fps is not None and getattr(video_processor, "num_frames", None):
            index = indices(num_frames=int(min(total, total / rate * fps)))  # it would ignore fps
        elif fps is not None or options.get("do_sample_frames"):
            index = indices(**({} if fps is None else {"fps": fps}))
        elif max_frames is None and total > DEFAULT_MAX_FRAMES:
            raise InputError(
                f"{type(video_processor).__name__} takes all frames of a video, here {total}: give fps=, num_frames= "
                "or max_frames=."
            )
        else:
            index = np.arange(total)
        return index if max_frames is None or len(index) <= max_frames else indices(num_frames=max_frames)

    return sample
