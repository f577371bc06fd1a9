"""The bundled toy under plain transformers: nothing of the library but the task takes part."""

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from hooked_mllm.toys import Example, path

Head = tuple[int, int]


@lru_cache(maxsize=1)
def processor():
    return AutoProcessor.from_pretrained(path("toy-qwen3-vl"))


@lru_cache(maxsize=3)
def model(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(
        path("toy-qwen3-vl"), dtype=dtype, attn_implementation=attention
    ).eval()


def inputs(examples: list[Example]) -> dict[str, Tensor]:
    texts = []
    for e in examples:
        user = [*({"type": "image"} for _ in e.images), {"type": "text", "text": e.question}]
        messages = [{"role": "user", "content": user}]
        if e.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": e.system}]})
        texts.append(processor().apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    images = [[*e.images] for e in examples]
    return dict(processor()(text=texts, images=images, padding=True, return_tensors="pt"))


@torch.no_grad()
def accuracy(examples: list[Example], zeroed: list[Head] = (), dtype: torch.dtype = torch.float32) -> float:
    """Share of right answers with the z of some heads set to zero at the input of `o_proj`."""
    toy, vocabulary = model(dtype), processor().tokenizer.get_vocab()
    handles = []
    for layer, head in zeroed:
        attention = toy.model.language_model.layers[layer].self_attn

        def zero(module, args, at=slice(head * attention.head_dim, (head + 1) * attention.head_dim)):
            z = args[0].clone()
            z[..., at] = 0
            return (z,)

        handles.append(attention.o_proj.register_forward_pre_hook(zero))
    try:
        best = toy(**inputs(examples), logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1).tolist()
    finally:
        for handle in handles:
            handle.remove()
    return sum(b == vocabulary[e.answer] for b, e in zip(best, examples, strict=True)) / len(examples)


@torch.no_grad()
def retrieval_attention_mass(examples: list[Example]) -> Tensor:
    """Mean over question tokens of the eager attention on the one token of the target cell: `[layer head]`."""
    toy, batch = model(attention="eager"), inputs(examples)
    attentions = toy(**batch, output_attentions=True, use_cache=False).attentions
    pattern = torch.stack(attentions)  # [layer batch head query key]
    total = torch.zeros(pattern.shape[0], pattern.shape[2], dtype=torch.float64)
    for row, e in enumerate(examples):
        cells = (batch["input_ids"][row] == toy.config.image_token_id).nonzero()[:, 0].view(len(e.images), 6, 6)
        key = cells[e.target.image, e.target.y0 // 16, e.target.x0 // 16]
        asked = len(processor().tokenizer(e.question)["input_ids"])
        question = slice(-3 - asked, -3)  # the prompt ends with <|im_end|> <|im_start|> assistant
        total += pattern[:, row, :, question, key].double().mean(-1)
    return total / len(examples)
