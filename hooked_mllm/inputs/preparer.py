"""From a question and pictures to model inputs, through the model's own processor and chat template."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.video_utils import VideoMetadata

from hooked_mllm.errors import InputError, nearest
from hooked_mllm.families.base import Family
from hooked_mllm.inputs import video as loading
from hooked_mllm.inputs.images import Images, load_image, media_list
from hooked_mllm.inputs.prompt import Processor, Tokenizer, check_special, check_text, render, token_spans
from hooked_mllm.inputs.sample import Preparation, Sample, SampleBatch, Target, is_per_token
from hooked_mllm.inputs.video import Number, Video, Videos
from hooked_mllm.layout import ImageMedia, TokenLayout, VideoMedia


class Preparer:
    """Makes samples for one model, with its own processor and chat template, or with another `tokenizer`."""

    def __init__(
        self, processor: Processor | None, config: PreTrainedConfig, family: Family, tokenizer: Tokenizer | None = None
    ) -> None:
        if processor is None:
            raise InputError(
                "This model came without a processor, which `prepare` needs: give one to `from_model(model, "
                "processor=...)`, or load a checkpoint that has its processor files. Everything else takes model "
                "inputs as a mapping."
            )
        self.processor, self.config, self.family = processor, config, family
        self.tokenizer: Any = tokenizer if tokenizer is not None else processor.tokenizer

    def __call__(
        self,
        question: str | Sequence[str],
        images: Images | Sequence[Images | None] | None = None,
        videos: Videos | Sequence[Videos | None] | None = None,
        system: str | Sequence[str | None] | None = None,
        answer: str | Sequence[str | None] | None = None,
        target: Target | Sequence[Target | None] | None = None,
        id: str | Sequence[str | None] | None = None,
        *,
        fps: Number | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        min_overlap: Number = 0.0,
        padding_side: str = "left",
        **processor_kwargs: Any,
    ) -> Sample | SampleBatch:
        """Prepare one sample, or with a list of questions a batch.

        The prompt holds the images, then the videos, then the question, as the model's chat template writes them.

        Args:
            question: The question, or a list of them; everything below is then a list of the same length, or `None`.
                (`system` and the sampling of videos may also be one for all.)
            images: A picture or a list of them: PIL images, paths, arrays.
            videos: A video or a list of them: paths, `Video`s, frames, pairs (frames, fps).
            system: The system prompt; without one, the template's own default.
            answer: A text put after the prompt, token by token what the model would have generated.
            target: The region that the question is about, such as `Box(412, 230, 520, 371)`, or a list of regions.
            id: A name for the sample.
            fps: Frames a second to take from a video file; of frames in memory, their own rate.
            num_frames: Frames to take from a video file.
            max_frames: The most frames to take from a video file by `fps`.
            min_overlap: The least share of a token's footprint that the target must cover.
            padding_side: Where a batch is padded, "left" or "right".
            **processor_kwargs: For the processor, such as `size` or `crop_to_patches`.
        """
        self._check_names(processor_kwargs)
        decode = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames}
        prepared = partial(self._one, decode, processor_kwargs, float(min_overlap))
        columns: dict[str, Any] = {
            "images": images, "videos": videos, "system": system, "answer": answer, "target": target, "id": id,
        }  # fmt: skip
        if isinstance(question, str):
            return prepared(question, **columns)
        if not isinstance(question, Sequence):
            check_text("question", question)
        n = len(question)
        if not n:
            raise InputError("The batch is empty: give one question at least.")
        if isinstance(system, str):
            columns["system"] = [system] * n
        # the arguments of each question
        entries = zip(question, *(_column(name, value, n) for name, value in columns.items()), strict=True)
        return SampleBatch.collate([prepared(*entry) for entry in entries], padding_side)

    def _check_names(self, arguments: Mapping[str, Any]) -> None:
        known = _processor_arguments(self.processor)
        unknown = [name for name in arguments if name not in known] if known else []
        if unknown:
            own = [name for name in inspect.signature(self.__call__).parameters if name != "processor_kwargs"]
            hints = [f"prepare takes no argument {x!r}. {nearest(x, [*own, *sorted(known)], n=1)}" for x in unknown]
            takes = f"It takes {', '.join(own)}, and what {type(self.processor).__name__} takes."
            raise InputError(" ".join([*(hint.strip() for hint in hints), takes]))

    def _one(
        self,
        decode: Mapping[str, Any],
        processor_kwargs: Mapping[str, Any],
        min_overlap: float,
        question: str,
        images: Images | None,
        videos: Videos | None,
        system: str | None,
        answer: str | None,
        target: Target | None,
        id: str | None,
    ) -> Sample:
        placeholders = [getattr(self.processor, f"{kind}_token", "") for kind in ("image", "video")]
        check_text("question", question)
        for name, text in (("system prompt", system), ("answer", answer)):
            if text is not None:
                check_text(name, text)
        check_special(question, "question", self.tokenizer, placeholders)
        check_special(system or "", "system prompt", self.tokenizer, placeholders)
        shown = tuple(load_image(image) for image in media_list(images))
        films = tuple(loading.as_video(video, **decode) for video in loading.as_list(videos))
        prompt, texts = render(self.processor, question, system, len(shown), len(films))
        inputs = self._process(prompt, shown, films, processor_kwargs)
        # the processor's own placeholders in the text, before it widens them to `visual_token_ids`
        marks = {self.tokenizer.convert_tokens_to_ids(p) for p in placeholders if p}
        spans = token_spans(prompt, texts, self.tokenizer, inputs["input_ids"][0].tolist(), marks)
        photos = [ImageMedia(image.width, image.height) for image in shown]
        clips = [VideoMedia(film.width, film.height, len(film), film.times_s) for film in films]
        items = self.family.visual_items(self.config, self.processor, inputs, (*photos, *clips))
        if answer is not None:
            spans["answer"] = [self._append(inputs, answer, placeholders)]
        self.family.check_inputs(inputs, self.config)
        layout = TokenLayout.build(inputs["input_ids"][0], items, self.family.visual_token_ids(self.config), spans)
        pad = self.tokenizer.pad_token_id
        return Sample(
            inputs=inputs,
            layout=layout,
            question=question,
            answer=answer,
            images=shown,
            videos=films,
            target=target,
            target_mask=None if target is None else layout.target(target, min_overlap),
            id=id,
            template=hashlib.sha256(str(self.processor.chat_template).encode()).hexdigest()[:16],
            pad_token_id=pad if pad is not None else self.tokenizer.eos_token_id or 0,
            preparation=Preparation(system, min_overlap, dict(processor_kwargs)),
            family=self.family.name,
        )

    def _process(
        self, text: str, shown: Sequence[Image.Image], films: Sequence[Video], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        media: dict[str, Any] = {}
        if shown:
            # nested: LLaVA-OneVision takes a flat list for samples of one image each
            media["images"] = [list(shown)]
        if films:
            # [frame height width channel] -> [frame channel height width]
            media["videos"] = [torch.from_numpy(film.frames).permute(0, 3, 1, 2).contiguous() for film in films]
            media["video_metadata"] = [_metadata(film) for film in films]
            media["videos_kwargs"] = {"input_data_format": "channels_first", "do_sample_frames": False}
            video_processor = getattr(self.processor, "video_processor", None)
            if getattr(video_processor, "cap_pixels_per_frame", True) is None:
                # what None means; given explicitly, transformers does not warn
                media["videos_kwargs"]["cap_pixels_per_frame"] = False
        try:
            out = self.processor(text=[text], return_tensors="pt", **media, **kwargs)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            lengths, hint = sorted({len(film) for film in films}), ""
            if len(lengths) > 1:
                hint = f" The videos have {lengths} frames: this processor may need one number, see num_frames=."
            raise InputError(f"{type(self.processor).__name__} rejects these inputs: {error}{hint}") from error
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def _append(self, inputs: dict[str, Tensor], answer: str, placeholders: Sequence[str]) -> tuple[int, int]:
        """Append the answer's tokens to the prompt's, which stay those that `generate` would start from."""
        inside = ", ".join(repr(p) for p in placeholders if p and p in answer)
        if inside:
            raise InputError(f"The answer contains {inside}, which represents an image or a video.")
        ids = self.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        if not ids.shape[-1]:
            raise InputError("The answer is empty: leave it out, or give a text.")
        n = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if is_per_token(value, n):
                more = torch.full_like(ids, int(name == "attention_mask")) if name != "input_ids" else ids
                inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)  # [1 prompt] -> [1 prompt + answer]
        return n, n + ids.shape[1]


def _processor_arguments(processor: Processor) -> set[str]:
    """The keywords that a processor takes, its own and those of its parts; none if it declares none."""
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", None)
    if not declared:
        return set()
    known = {*declared, "common_kwargs"}
    parts = {"text_kwargs": "tokenizer", "images_kwargs": "image_processor", "videos_kwargs": "video_processor"}
    for kind, part in parts.items():
        own = getattr(getattr(processor, part, None), "valid_kwargs", None)
        for keywords in (declared.get(kind), own):
            known |= set(getattr(keywords, "__annotations__", ()))
    return known


def _column(name: str, value: Any, n: int) -> list[Any]:
    """One entry for each question."""
    if value is None:
        return [None] * n
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != n:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        got = f"{len(value)} entries" if is_list else type(value).__name__
        raise InputError(f"With a list of {n} questions `{name}` is a list of {n} entries (or None); got {got}.")
    return list(value)


def _metadata(film: Video) -> VideoMetadata:
    """The frames' times as frame numbers of the original, which is how processors take them.

    Made afresh for each call: Qwen3-VL's processor appends to the list of frame numbers.
    """
    exact = [t * film.fps for t in film.times_s]
    # an even frame rate gives whole numbers but for rounding, and prompts print times to a tenth of a second
    whole = all(abs(x - round(x)) < 0.01 for x in exact)
    numbers: list[Any] = [round(x) if whole else x for x in exact]
    last = int(max(exact))
    return VideoMetadata(
        total_num_frames=max(last + 1, len(film)),
        fps=film.fps,
        width=film.width,
        height=film.height,
        duration=(last + 1) / film.fps,
        frames_indices=numbers,
    )
