"""OtherImage and OtherQuestion: the same question with other pictures, the same pictures with another question."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hooked_mllm.checks import checked
from hooked_mllm.corruptions.base import Corruption, check_seed, described_function, drawing
from hooked_mllm.corruptions.pixels import resized
from hooked_mllm.errors import InputError
from hooked_mllm.inputs import images as loading
from hooked_mllm.inputs.images import ImageInput
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.inputs.video import Video

#: pictures that can replace those of a sample: of another sample, a video, one image, or several of these
Candidate = Sample | Video | ImageInput | Sequence[ImageInput | Video]
#: one candidate, or several
Candidates = Candidate | SampleBatch | Sequence[Candidate | SampleBatch]


@checked
class OtherImage(Corruption):
    """The same question about other pictures, drawn from a set.

    One candidate replaces all pictures of the sample, so it must have the same number of images and videos, and videos
    of the same number of frames. The sample's own pictures are never drawn; a video gets the times of its predecessor.

    Args:
        images: The candidates: a picture (PIL image, path, array) or `Video`, a list of pictures for samples of
            several, a Sample (its pictures), or a list of any of these. A list of pictures is a list of candidates of
            one picture each.
        seed: Seed of the draw. Samples with other questions or pictures get other draws from one seed.
        resize: Resize them to the sizes of those they replace, because the number of tokens depends on the size.

    Raises:
        InputError: For no candidate, or (when called) none that fits the sample.
        LayoutError: When called with resize=False, for pictures that give other tokens.

    Examples:
        >>> OtherImage([Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")])
        OtherImage(candidates=2, seed=0, resize=True)
    """

    def __init__(self, images: Candidates, seed: int = 0, resize: bool = True) -> None:
        check_seed(seed)
        self.candidates = tuple(_candidates(images))
        if not self.candidates:
            raise InputError("OtherImage has no pictures to draw from: give one at least.")
        self.seed, self.resize = seed, resize

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        n = len(self.candidates)
        return {"corruption": "OtherImage", "candidates": n, "seed": self.seed, "resize": self.resize}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures of the candidate that is drawn."""
        if not sample.images and not sample.videos:
            raise InputError("This sample has no images and no videos to replace.")
        for number in drawing(self.seed, sample).permutation(len(self.candidates)):
            images, videos = _pictures(self.candidates[number])
            if _can_replace(sample, images, videos):
                if self.resize:
                    images = [resized(i, o.size) for i, o in zip(images, sample.images, strict=True)]
                    videos = [_refitted(v, o) for v, o in zip(videos, sample.videos, strict=True)]
                return {"images": images or None, "videos": videos or None}
        frames = ", ".join(str(len(v)) for v in sample.videos)
        raise InputError(
            f"None of the {len(self.candidates)} candidates can replace the pictures of this sample, "
            f"{len(sample.images)} images and {len(sample.videos)} videos{f' of {frames} frames' if frames else ''}: a "
            "candidate needs these numbers, and other pictures than the sample's own. For samples of several pictures "
            "give lists of that length, or samples."
        )


@checked
class OtherQuestion(Corruption):
    """Another question about the same pictures.

    The counterpart corresponds to the sample only where the questions have the same number of tokens; see `check_pair`.

    Args:
        text: The question, or a function that returns it for a sample.

    Examples:
        >>> OtherQuestion("what color is the heart ?")
        OtherQuestion(text='what color is the heart ?')
    """

    same_length = False

    def __init__(self, text: str | Callable[[Sample], str]) -> None:
        if not isinstance(text, str) and not callable(text):
            raise InputError(f"The other question is a text, or a function of the sample; got {type(text).__name__}.")
        self.text = text

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {"corruption": "OtherQuestion", "text": described_function(self.text)}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The other question."""
        return {"question": self.text if isinstance(self.text, str) else self.text(sample)}


def _candidates(pictures: Candidates) -> Iterator[Candidate]:
    several = [pictures] if isinstance(pictures, Sample | SampleBatch | Video) else loading.media_list(pictures)
    for candidate in several:
        yield from candidate if isinstance(candidate, SampleBatch) else (candidate,)


def _pictures(candidate: Candidate) -> tuple[list[Image.Image], list[Video]]:
    if isinstance(candidate, Sample):
        return list(candidate.images), list(candidate.videos)
    pictures = [candidate] if isinstance(candidate, Video) else loading.media_list(candidate)
    videos = [picture for picture in pictures if isinstance(picture, Video)]
    return [loading.load_image(picture) for picture in pictures if not isinstance(picture, Video)], videos


def _can_replace(sample: Sample, images: list[Image.Image], videos: list[Video]) -> bool:
    """Whether the numbers of pictures and frames are the sample's, and any picture differs from its own."""
    if len(images) != len(sample.images) or [len(v) for v in videos] != [len(v) for v in sample.videos]:
        return False
    old = [np.asarray(image) for image in sample.images] + [video.frames for video in sample.videos]
    new = [np.asarray(image) for image in images] + [video.frames for video in videos]
    return not all(map(np.array_equal, new, old))


def _refitted(video: Video, original: Video) -> Video:
    size = (original.width, original.height)
    frames = np.stack([np.asarray(resized(Image.fromarray(f), size)) for f in video.frames])
    return Video(frames, original.times_s, original.fps, video.source)
