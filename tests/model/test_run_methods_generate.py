"""Generation with images: token for token that of transformers, with hooks that fire in every step."""

import pytest
import torch

from helpers.tiny import ALL_FAMILIES, FAMILIES, tiny_image
from helpers.wrapped import LAYERS, in_place, model_inputs, plain, wrapped

GREEDY = {"max_new_tokens": 6, "do_sample": False}
KINDS = {
    "an image": {},
    "images and a video": {"images": 2, "video": True},
    "a batch": {"images": 2, "batch": 2},
}
WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True, "temperature": 1.0},
}


def new_tokens(tokens, inputs):
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("name", "kind", "way"),
    [(n, k, w) for n in ALL_FAMILIES for k in KINDS for w in ("cache", "no cache")]
    + [(n, "a batch", w) for n in FAMILIES for w in ("static cache", "beams", "sampling")],
)
def test_tokens_are_those_of_transformers(name, kind, way):
    inputs, options = model_inputs(name, **KINDS[kind]), {**GREEDY, **WAYS[way]}
    torch.manual_seed(3)
    expected = plain(name).generate(**inputs, **options)
    torch.manual_seed(3)
    model = wrapped(name)
    got = model.generate(inputs, **options)
    assert torch.equal(got, expected)
    torch.manual_seed(3)
    with model.hooks([("*", lambda x, hook: x)]):  # every point in use
        assert torch.equal(model.generate(inputs, **options), expected)
    assert new_tokens(got, inputs).shape[1] > 1


def test_hooks_fire_in_every_step_and_have_its_number(family):
    inputs, model, seen = model_inputs(family, 1, 2), wrapped(family), []
    n = inputs["input_ids"].shape[1]

    def note(x, hook):
        seen.append((hook.step, tuple(x.shape)))

    with model.hooks([("blocks.1.attn.hook_pattern", note)]):
        tokens = model.generate(inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert seen == [(0, (2, 4, n, n)), (1, (2, 4, 1, n + 1)), (2, (2, 4, 1, n + 2)), (3, (2, 4, 1, n + 3))]
    assert tokens.shape[1] == n + 4
    assert model.hook_dict["blocks.1.attn.hook_pattern"].step == 0  # over


def test_images_are_encoded_in_the_prefill_alone(family):
    model, steps = wrapped(family), []
    with model.hooks([("vision.hook_out", lambda x, hook: steps.append(hook.step))]):
        model.generate(model_inputs(family), **GREEDY)
    assert steps == [0]


@pytest.mark.parametrize("way", ["cache", "no cache", "static cache"])
def test_an_edit_in_every_step_equals_the_same_edit_by_a_torch_hook(family, way):
    """Head 1 of one block ablated, against the input of W_O zeroed in an unwrapped model."""
    inputs, options = model_inputs(family, 1, 2), {**GREEDY, **WAYS[way], "eos_token_id": None, "max_new_tokens": 8}
    reference = plain(family)
    o_proj = reference.model.language_model.layers[1].self_attn.o_proj

    def zero(module, args):
        z = args[0].unflatten(-1, (4, 8)).clone()
        z[:, :, :3] = 0
        return (z.flatten(-2),)

    handle = o_proj.register_forward_pre_hook(zero)
    expected = reference.generate(**inputs, **options)
    handle.remove()

    def ablate(z, hook):
        z[:, :, :3] = 0

    model = wrapped(family)
    with model.hooks([("blocks.1.attn.hook_z", ablate)]):
        got = model.generate(inputs, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.generate(inputs, **options))  # it is an edit that shows


def test_a_hook_may_act_in_decoding_alone(family):
    inputs, model, options = model_inputs(family), wrapped(family), {**GREEDY, "eos_token_id": None}

    def late(x, hook):
        return x + 3 * torch.linspace(-1, 1, x.shape[-1]) if hook.step >= 2 else None

    with model.hooks([("blocks.*.hook_resid_post", late)]):
        got = new_tokens(model.generate(inputs, **options), inputs)
    expected = new_tokens(plain(family).generate(**inputs, **options), inputs)
    assert torch.equal(got[:, :2], expected[:, :2]) and not torch.equal(got[:, 2:], expected[:, 2:])


def test_a_rotated_key_edited_in_place_lasts_one_step(family):
    """The KV cache keeps the unedited key: from the second token on only what followed from the first differs."""
    inputs, model = model_inputs(family), wrapped(family)
    name = f"blocks.{LAYERS - 1}.attn.hook_rot_k"  # no block behind it caches what follows from the edit
    edit = in_place(name)
    options = {**GREEDY, "eos_token_id": None, "output_scores": True, "return_dict_in_generate": True}

    def first_step(x, hook):
        if hook.step == 0:
            edit(x, hook)

    plainly = plain(family).generate(**inputs, **options)
    forced = plainly.sequences[:, inputs["input_ids"].shape[1] :]

    scores = []

    def force(ids, logits):  # the tokens of the unedited run, so that later scores are comparable
        scores.append(logits.clone())
        place = ids.shape[1] - inputs["input_ids"].shape[1]
        return torch.full_like(logits, -1e9).scatter(1, forced[:, place : place + 1], 0.0)

    with model.hooks([(name, first_step)]):
        model.generate(inputs, **GREEDY, eos_token_id=None, logits_processor=[force])
    assert not torch.equal(scores[0], plainly.scores[0])
    for score, plain_score in zip(scores[1:], plainly.scores[1:], strict=True):
        assert torch.equal(score, plain_score)


def test_a_streamer_gets_the_tokens(family):
    inputs, chunks = model_inputs(family), []

    class Streamer:
        def put(self, value):
            chunks.append(value.reshape(-1))

        def end(self):
            chunks.append(None)

    tokens = wrapped(family).generate(inputs, streamer=Streamer(), **GREEDY)
    assert chunks[-1] is None and torch.equal(torch.cat(chunks[:-1]), tokens[0])


def test_an_error_in_a_step_leaves_nothing(family):
    inputs, model = model_inputs(family), wrapped(family)

    def fail(z, hook):
        if hook.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks([("blocks.0.attn.hook_z", fail)]):
        model.generate(inputs, eos_token_id=None, **GREEDY)
    assert model.list_hooks() == {} and model.hook_dict["hook_embed"].step == 0
    assert torch.equal(model.generate(inputs, **GREEDY), plain(family).generate(**inputs, **GREEDY))
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


def test_generations_do_not_colour_each_other(family):
    """Qwen3-VL keeps position offsets from call to call."""
    first, second, model = model_inputs(family), model_inputs(family, 2), wrapped(family)
    words = model.hf_model.get_input_embeddings()(torch.arange(20, 40)[None])
    text = {"inputs_embeds": words, "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    runs = [lambda: model.generate(first, **GREEDY), lambda: model(first), lambda: model(text)]
    expected = [run() for run in runs]
    for run, before in zip(runs, expected, strict=True):
        model.generate(second, **GREEDY)
        assert torch.equal(run(), before)


def test_a_prepared_batch_generates_as_its_samples_alone(family):
    model = wrapped(family)
    questions, images = ["What is this?", "Where is the dog in the picture?"], [tiny_image(), tiny_image(24, 24, 1)]
    batch = model.prepare(questions, images=[[i] for i in images])
    together = new_tokens(model.generate(batch, eos_token_id=None, **GREEDY), batch.inputs)
    for row, sample in zip(together, batch, strict=True):
        alone = new_tokens(model.generate(sample, eos_token_id=None, **GREEDY), sample.inputs)[0]
        assert torch.equal(row, alone)
