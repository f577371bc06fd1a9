"""The bundled toys under plain transformers: nothing of the library but the task takes part."""

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.video_utils import VideoMetadata

from hooked_mllm.toys import Example, VideoExample, path

Head = tuple[int, int]
Examples = list[Example] | list[VideoExample]
NAME = "toy-qwen3-vl"


@lru_cache(maxsize=4)
def processor(name: str = NAME):
    return AutoProcessor.from_pretrained(path(name))


@lru_cache(maxsize=6)
def model(dtype: torch.dtype = torch.float32, attention: str = "sdpa", name: str = NAME) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path(name), dtype=dtype, attn_implementation=attention).eval()


def inputs(examples: Examples, name: str = NAME) -> dict[str, Tensor]:
    texts = []
    for e in examples:
        shown = [{"type": "video"}] if isinstance(e, VideoExample) else [{"type": "image"} for _ in e.images]
        user = [*shown, {"type": "text", "text": e.question}]
        messages = [{"role": "user", "content": user}]
        if e.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": e.system}]})
        texts.append(processor(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if isinstance(examples[0], VideoExample):
        media = {
            "videos": [torch.from_numpy(e.video.frames).permute(0, 3, 1, 2) for e in examples],
            # two frames a second, none left out
            "video_metadata": [
                VideoMetadata(total_num_frames=len(e.video), fps=2, frames_indices=list(range(len(e.video))))
                for e in examples
            ],
            "videos_kwargs": {"input_data_format": "channels_first", "do_sample_frames": False},
        }
    else:
        media = {"images": [[*e.images] for e in examples]}
    batch = processor(name)(text=texts, **media, padding=True, padding_side="left", return_tensors="pt")
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


@torch.no_grad()
def accuracy(
    examples: Examples, zeroed: list[Head] = (), dtype: torch.dtype = torch.float32, name: str = NAME
) -> float:
    """Share of right answers with the z of some heads set to zero at the input of `o_proj`."""
    toy, vocabulary = model(dtype, name=name), processor(name).tokenizer.get_vocab()
    handles = []
    for layer, head in zeroed:
        attention = toy.model.language_model.layers[layer].self_attn

        def zero(module, args, at=slice(head * attention.head_dim, (head + 1) * attention.head_dim)):
            z = args[0].clone()
            z[..., at] = 0
            return (z,)

        handles.append(attention.o_proj.register_forward_pre_hook(zero))
    try:
        best = toy(**inputs(examples, name), logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1).tolist()
    finally:
        for handle in handles:
            handle.remove()
    return sum(b == vocabulary[e.answer] for b, e in zip(best, examples, strict=True)) / len(examples)


@torch.no_grad()
def retrieval_attention_mass(examples: Examples, name: str = NAME) -> Tensor:
    """Mean over question tokens of the eager attention on the tokens of the target cell: `[layer head]`."""
    if isinstance(examples[0], VideoExample):
        return torch.stack([_video_mass(e, name) for e in examples]).mean(0)
    toy, batch = model(attention="eager", name=name), inputs(examples, name)
    attentions = toy(**batch, output_attentions=True, use_cache=False).attentions
    pattern = torch.stack(attentions)  # [layer batch head query key]
    total = torch.zeros(pattern.shape[0], pattern.shape[2], dtype=torch.float64)
    for row, e in enumerate(examples):
        visual = (batch["input_ids"][row] == toy.config.image_token_id).nonzero()[:, 0]
        keys = visual.view(len(e.images), -1)[e.target.image, within_page(e, name)]
        n_question = len(processor(name).tokenizer(e.question)["input_ids"])
        question = slice(-3 - n_question, -3)  # the prompt ends with <|im_end|> <|im_start|> assistant
        total += pattern[:, row, :, question][..., keys].double().sum(-1).mean(-1)
    return total / len(examples)


def _video_mass(example: VideoExample, name: str) -> Tensor:
    """The mass of one video: its frames' tokens in order, the target's counted out by hand."""
    toy, batch = model(attention="eager", name=name), inputs([example], name)
    pattern = torch.stack(toy(**batch, output_attentions=True, use_cache=False).attentions)[:, 0]
    config = toy.config
    ids = {config.image_token_id, getattr(config, "video_token_id", None)}
    visual = torch.tensor([i for i, token in enumerate(batch["input_ids"][0].tolist()) if token in ids])
    (x, y, _, _), moment = example.target.box, int(example.target.start_s)
    row, col = int(y) // 32, int(x) // 32
    if "qwen" in name:  # both frames in one step of 6 x 6 tokens
        cells = [moment * 36 + (2 * row + i) * 6 + 2 * col + j for i in range(2) for j in range(2)]
    else:  # each frame 3 x 3
        cells = [(2 * moment + frame) * 9 + row * 3 + col for frame in range(2)]
    n_question = len(processor(name).tokenizer(example.question)["input_ids"])
    return pattern[:, :, -3 - n_question : -3][..., visual[cells]].double().sum(-1).mean(-1)


def within_page(example: Example, name: str) -> list[int]:
    """Which of a page's visual tokens see the target's cell, counted by hand on the 6 x 6 grid."""
    row, col = int(example.target.y0) // 16, int(example.target.x0) // 16
    if "internvl" in name:  # four tiles of 3 x 3, then a thumbnail of 3 x 3
        tile = (row >= 3) * 2 + (col >= 3)
        return [tile * 9 + row % 3 * 3 + col % 3, 36 + row // 2 * 3 + col // 2]
    if "llava" in name and len(example.images) == 1:  # the base view, then rows of six and a newline
        return [row * 6 + col, 36 + row * 7 + col]
    return [row * 6 + col]
