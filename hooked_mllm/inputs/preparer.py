"""From a question and pictures to model inputs, through the model's own processor and chat template."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.video_utils import VideoMetadata

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, nearest
from hooked_mllm.families.base import Family
from hooked_mllm.inputs import video as loading
from hooked_mllm.inputs.images import Images, load_image, media_list
from hooked_mllm.inputs.options import declared_options, frame_sampler, merged_options, processor_in_effect
from hooked_mllm.inputs.prompt import (
    Processor,
    Tokenizer,
    check_special,
    check_text,
    open_thought,
    render,
    token_spans,
)
from hooked_mllm.inputs.sample import Preparation, Sample, SampleBatch, Target, check_side, is_per_token
from hooked_mllm.inputs.video import Number, Video, Videos, check_sampling
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

    @checked
    def __call__(
        self,
        question: str | Sequence[str],
        images: Images | Sequence[Images | None] | None = None,
        videos: Videos | Sequence[Videos | None] | None = None,
        system: str | Sequence[str | None] | None = None,
        answer: str | Sequence[str | None] | None = None,
        target: Target | Sequence[Target | None] | None = None,
        id: str | int | Sequence[str | int | None] | None = None,
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
            images: A picture or a list of them: PIL images, paths, arrays. An EXIF orientation is applied, and regions
                are in pixels of the upright picture.
            videos: A video or a list of them: paths, `Video`s, frames, pairs (frames, fps).
            system: The system prompt; without one, the template's own default.
            answer: A text put after the prompt, token by token what the model would have generated. Where the chat
                template opens a thought, it starts with the end of the thought, such as "</think>", up to which tokens
                count as template.
            target: The region that the question is about, such as `Box(412, 230, 520, 371)`, or a list of regions.
            id: A name for the sample.
            fps: Frames a second to take from a video file; of frames in memory, their own rate. Without `fps` and
                `num_frames`, the frames are those that the model's video processor takes.
            num_frames: Frames to take from a video file.
            max_frames: The most frames to take from a video file.
            min_overlap: The least share of a token's footprint that the target must cover.
            padding_side: Where a batch is padded, "left" or "right"; a sample as well, with `padding="max_length"`.
            **processor_kwargs: For the processor, such as `size` or `crop_to_patches`. Options that do not fit the
                model, such as another `patch_size`, raise an InputError.
        """
        self._check_names(processor_kwargs)
        check_side(padding_side)
        merged = merged_options(self.processor, processor_kwargs)
        effective = processor_in_effect(self.processor, merged)
        sampling = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames}
        check_sampling(**sampling)
        samples = getattr(effective.video_processor, "do_sample_frames", False)
        options = merged["videos_kwargs"] | {"do_sample_frames": samples}
        own = getattr(self.processor, "video_processor", None)
        decode = sampling | {"sampler": frame_sampler(own, options, **sampling)}
        prepared = partial(self._one, decode, effective, processor_kwargs, float(min_overlap), padding_side)
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
        known = declared_options(self.processor)
        unknown = [name for name in arguments if name not in known] if known else []
        if unknown:
            own = [name for name in inspect.signature(self.__call__).parameters if name != "processor_kwargs"]
            hints = [f"prepare takes no argument {x!r}. {nearest(x, [*own, *sorted(known)], n=1)}" for x in unknown]
            takes = f"It takes {', '.join(own)}, and what {type(self.processor).__name__} takes."
            raise InputError(" ".join([*(hint.strip() for hint in hints), takes]))

    def _one(
        self,
        decode: Mapping[str, Any],
        effective: SimpleNamespace,
        processor_kwargs: Mapping[str, Any],
        min_overlap: float,
        padding_side: str,
        question: str,
        images: Images | None,
        videos: Videos | None,
        system: str | None,
        answer: str | None,
        target: Target | None,
        id: str | int | None,
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
        cap = getattr(effective.video_processor, "cap_pixels_per_frame", True)
        inputs = self._process(prompt, shown, films, processor_kwargs, cap)
        inputs, padding = _without_padding(inputs)
        # the processor's own placeholders in the text, before it widens them to `visual_token_ids`
        marks = {self.tokenizer.convert_tokens_to_ids(p) for p in placeholders if p}
        spans = token_spans(prompt, texts, self.tokenizer, inputs["input_ids"][0].tolist(), marks)
        photos = [ImageMedia(image.width, image.height) for image in shown]
        clips = [VideoMedia(film.width, film.height, len(film), film.times_s) for film in films]
        items = self.family.visual_items(self.config, effective, inputs, (*photos, *clips))
        if answer is not None:
            spans["answer"] = [self._append(inputs, answer, placeholders, open_thought(prompt, texts["question"]))]
        self.family.check_inputs(inputs, self.config)
        layout = TokenLayout.build(inputs["input_ids"][0], items, self.family.visual_token_ids(self.config), spans)
        if padding is not None:
            if not _names_side(processor_kwargs):
                padding = replace(padding, **_sides(padding.left + padding.right, padding_side))
            inputs, layout = padding.applied(inputs), layout.padded(padding.left, padding.right)
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
            preparation=Preparation(system, min_overlap, dict(processor_kwargs), padding_side),
            family=self.family.name,
        )

    def _process(
        self, text: str, shown: Sequence[Image.Image], films: Sequence[Video], options: Mapping[str, Any], cap: Any
    ) -> dict[str, Tensor]:
        media: dict[str, Any] = {}
        # the frames are sampled before
        kwargs = {name: value for name, value in options.items() if name not in ("do_sample_frames", "videos_kwargs")}
        if shown:
            # nested: LLaVA-OneVision takes a flat list for samples of one image each
            media["images"] = [list(shown)]
        if films:
            # [frame height width channel] -> [frame channel height width]
            media["videos"] = [torch.from_numpy(film.frames).permute(0, 3, 1, 2).contiguous() for film in films]
            media["video_metadata"] = [_metadata(film) for film in films]
            fixed = {"input_data_format": "channels_first", "do_sample_frames": False}
            media["videos_kwargs"] = {**options.get("videos_kwargs", {}), **fixed}
            if cap is None:  # what None means; given explicitly, transformers does not warn
                media["videos_kwargs"]["cap_pixels_per_frame"] = False
        try:
            out = self.processor(text=[text], return_tensors="pt", **media, **kwargs)
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError) as error:
            lengths, hint = sorted({len(film) for film in films}), ""
            if len(lengths) > 1:
                hint = f" The videos have {lengths} frames: this processor may need one number, see num_frames=."
            if options:
                hint += f" If they do not fit this model, leave out {', '.join(f'{name}=' for name in options)}."
            raise InputError(f"{type(self.processor).__name__} rejects these inputs: {error}{hint}") from error
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def _append(
        self, inputs: dict[str, Tensor], answer: str, placeholders: Sequence[str], thought_end: str | None
    ) -> tuple[int, int]:
        """Append the answer's tokens to the prompt's, which stay those that `generate` would start from.

        `thought_end` ends a thought that the prompt opens.
        """
        inside = ", ".join(repr(p) for p in placeholders if p and p in answer)
        if inside:
            raise InputError(f"The answer contains {inside}, which represents an image or a video.")
        thought, closed, said = answer.rpartition(thought_end) if thought_end else ("", "", answer)
        if thought_end and not closed:
            raise InputError(
                f"The chat template opens a thought that {thought_end!r} ends, and the answer would be part of it: "
                f"start with the end of the thought, as in answer={thought_end + answer!r}."
            )
        said_only = said.lstrip() if thought_end else said
        before = self._tokens(thought + closed + said[: len(said) - len(said_only)])
        ids = torch.cat([before, self._tokens(said_only)], dim=1)
        if ids.shape[1] == before.shape[1]:
            raise InputError("The answer is empty: leave it out, or give a text.")
        n = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if is_per_token(value, n):
                more = torch.full_like(ids, int(name == "attention_mask")) if name != "input_ids" else ids
                inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)  # [1 prompt] -> [1 prompt + answer]
        return n + before.shape[1], n + ids.shape[1]

    def _tokens(self, text: str) -> Tensor:
        """Ids `[1 pos]` of a text by itself."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long().reshape(1, -1)


@dataclass(frozen=True)
class _Padding:
    """Padding positions that the processor added, and their value in each tensor."""

    left: int
    right: int
    fill: Mapping[str, int]

    def applied(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`[1 pos] -> [1 left + pos + right]`."""
        pad, sides = torch.nn.functional.pad, (self.left, self.right)
        return {k: pad(v, sides, value=self.fill[k]) if k in self.fill else v for k, v in inputs.items()}


def _without_padding(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], _Padding | None]:
    """The inputs without the positions that their attention mask marks as padding, and these."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or len(tokens) != 1:
        raise InputError(
            f"The processor returned {len(tokens)} sequences of a question, {'without' if mask is None else 'with'} an "
            "attention_mask; one is needed, with its mask. Leave out return_attention_mask= and "
            "return_overflowing_tokens=."
        )
    kept = mask[0].nonzero()[:, 0]
    if len(kept) == mask.shape[1]:
        return inputs, None
    start, stop, n = int(kept[0]), int(kept[-1]) + 1, mask.shape[1]
    fill = {name: int(v[0, 0 if start else -1]) for name, v in inputs.items() if is_per_token(v, n)}
    cut = {name: v[:, start:stop] if name in fill else v for name, v in inputs.items()}  # [1 pos] -> [1 kept]
    return cut, _Padding(start, n - stop, fill)


def _sides(count: int, side: str) -> dict[str, int]:
    return {"left": count, "right": 0} if side == "left" else {"left": 0, "right": count}


def _names_side(options: Mapping[str, Any]) -> bool:
    """Whether the options of a call contain the side of the padding, which is then the processor's."""
    return any("padding_side" in options.get(kind, {}) for kind in ("text_kwargs", "common_kwargs"))


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
