"""Runs with visual features that the test edits, in plain transformers."""

import torch

from helpers.cache_witness import hooked, plain
from helpers.tiny import tiny_image


def prepared(family, number=0, **more):
    text = ("What colour is the mug?", "Where is the dog in the picture of the star?")[number]
    return hooked(family).prepare(text, images=tiny_image(32, 24, seed=number), **more)


def with_features(family, inputs, change):
    """Logits of plain transformers after `change` of all that the language model is given for the visual tokens.

    `change` takes a list of tensors [visual d_model], the embeddings first and DeepStack's additions after them.
    """
    model, visual = plain(family), None
    ids = inputs["input_ids"][0]
    tokens = [
        getattr(model.config, name) for name in ("image_token_id", "video_token_id") if hasattr(model.config, name)
    ]
    visual = torch.isin(ids, torch.tensor(tokens))

    def pre(module, args, kwargs):
        embeds = kwargs["inputs_embeds"].clone()
        deep = kwargs.get("deepstack_visual_embeds") or []
        first, *more = change([embeds[0, visual].detach(), *(d.detach() for d in deep)])
        kwargs["inputs_embeds"] = embeds.detach().index_put((torch.tensor(0), visual.nonzero()[:, 0]), first)
        if more:
            kwargs["deepstack_visual_embeds"] = more
        return args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        return model(**inputs, use_cache=False).logits[0], visual
    finally:
        handle.remove()


def forced(family, sample, n):
    """The prompt and its greedy answer but the last token, by plain transformers; and the answer."""
    model = plain(family)
    out = model.generate(**sample.inputs, max_new_tokens=n, do_sample=False)[0, len(sample) :]
    more = len(out) - 1
    inputs = dict(sample.inputs)
    for name, value in sample.inputs.items():
        if value.shape == (1, len(sample)):
            fill = out[None, :-1] if name == "input_ids" else torch.full((1, more), int(name == "attention_mask"))
            inputs[name] = torch.cat([value, fill.to(value)], dim=1)
    return inputs, out


def reset(family):
    if family == "qwen3_vl":
        plain(family).model.rope_deltas = None


@torch.no_grad()
def likely(family, inputs, answer, at):
    """The answer's log-probability when the visual tokens numbered `at` get the mean features."""

    def occlude(features):
        out = [f.clone() for f in features]
        for f in out:
            f[at] = f.mean(0)
        return out

    reset(family)
    logits, _ = with_features(family, inputs, occlude)
    return float(logits[-len(answer) :].double().log_softmax(-1).gather(1, answer[:, None]).sum())
