"""What a model can be called with, and what is rejected because transformers would compute wrong results from it."""

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import BatchFeature, DynamicCache

from helpers.tiny import tiny_frames, tiny_image, tiny_inputs
from helpers.wrapped import in_place, model_inputs, plain, wrapped
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.resolve import (
    as_samples,
    each_prepared,
    each_sample,
    is_model_input,
    resolve_input,
    sample_count,
    samples_of,
    sequence_count,
    tensors_of,
)
from hooked_mllm.inputs.sample import SampleBatch
from hooked_mllm.metrics import MMRetHeads, NullQuery, VisionMass

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@torch.no_grad()
def test_samples_batches_mappings_and_keywords_are_the_same_to_the_model(family):
    model = wrapped(family)
    sample = model.prepare("What colour is the mug?", images=tiny_image())
    expected = plain(family)(**sample.inputs).logits
    feature = BatchFeature(dict(sample.inputs))
    for given in (sample, dict(sample.inputs), feature):
        assert torch.equal(model(given), expected)
        assert torch.equal(model.forward(given), expected)
        assert torch.equal(model.run_with_hooks(given), expected)
        assert torch.equal(model.run_with_cache(given)[0], expected)
    assert torch.equal(model(**feature), expected)
    assert torch.equal(model.generate(**feature, **GREEDY), model.generate(sample, **GREEDY))
    batch = model.prepare(["What is it?", "Where is the dog?"], images=[[tiny_image()], [tiny_image(24, 24)]])
    assert torch.equal(model(batch), plain(family)(**batch.inputs).logits)


@torch.no_grad()
def test_what_a_processor_returns_is_accepted(family):
    inputs = tiny_inputs(family, images=1, batch=2, video=True)
    assert torch.equal(wrapped(family)(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize("video", [False, True])
def test_visual_tokens_without_their_pixels_are_rejected_everywhere(family, video):
    model, inputs = wrapped(family), model_inputs(family, 1, 1, video)
    for name in [n for n in ("pixel_values", "pixel_values_videos") if n in inputs]:
        bare = {k: v for k, v in inputs.items() if k != name}
        for call in (model, model.generate, model.run_with_hooks, model.run_with_cache, model.resolve):
            with pytest.raises(InputError, match=f"holds \\d+ visual tokens .* but no `{name}` came with it"):
                call(bare)
        with pytest.raises(InputError, match="visual tokens"):
            model({**bare, name: None})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_pixels_are_rejected(family, bad):
    inputs = model_inputs(family)
    pixels = inputs["pixel_values"].clone()
    pixels.view(-1)[5] = bad
    with pytest.raises(InputError, match="`pixel_values` holds NaN or infinity"):
        wrapped(family)({**inputs, "pixel_values": pixels})


def test_qwen3_vl_needs_the_token_types_without_which_its_results_are_silently_wrong():
    inputs = model_inputs("qwen3_vl")
    inputs.pop("mm_token_type_ids")
    for call in (wrapped("qwen3_vl"), wrapped("qwen3_vl").generate):
        with pytest.raises(InputError, match="needs `mm_token_type_ids`.*Pass|pass everything"):
            call(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "hold no `input_ids`; they hold nothing"),
        ({"pixel_values": torch.zeros(1)}, "they hold pixel_values"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"must be a tensor \[batch pos\].*got \(5,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"at least one token; got \(1, 0\)"),
        ({"input_ids": [[1, 2]]}, "got list"),
    ],
    ids=["nothing", "no tokens", "no batch", "empty", "list"],
)
def test_mappings_that_are_no_model_inputs(inputs, message):
    with pytest.raises(InputError, match=message):
        wrapped("internvl")(inputs)


def test_other_types_are_rejected():
    model = wrapped("internvl")
    for wrong in ("What is this?", torch.zeros(1, 5, dtype=torch.long), [1, 2]):
        with pytest.raises(InputError, match=f"Expected a Sample, .* or a mapping.*got {type(wrong).__name__}"):
            inspect.unwrap(resolve_input)(wrong, model.family, model.hf_model.config, "cpu")


def test_a_sample_of_another_family_is_rejected(family):
    other = {"qwen3_vl": "internvl", "internvl": "llava_onevision", "llava_onevision": "qwen3_vl"}[family]
    model, made = wrapped(family), wrapped(other).prepare("What is it?", images=tiny_image(), id="one")
    pattern = (
        rf"^Sample 'one' was prepared by a {other} model; this one is {family}: prepare it again with this model\.$"
    )
    metric = VisionMass()
    for given in (made, SampleBatch.collate([made, made])):
        for use in (model, model.resolve, model.run_with_cache, model.generate):
            with pytest.raises(InputError, match=pattern):
                use(given)
        with pytest.raises(InputError, match=pattern):
            model.measure([given], metric, progress=False)
    # what shares a prefix is not resolved
    pair = next(NullQuery("Where is it?").pairs(wrapped(other), [made]))
    with pytest.raises(InputError, match=pattern):
        model.measure([pair], MMRetHeads(), progress=False)
    with pytest.raises(InputError, match=r"^This sample was prepared by"):
        model(replace(made, id=None))


def test_a_sample_made_by_hand_is_accepted(family):
    model = wrapped(family)
    made = model.prepare("What is it?", images=tiny_image())
    assert made.family == family
    assert torch.equal(model(replace(made, family=None)), model(made))


def test_inputs_are_not_changed(family):
    inputs = model_inputs(family, 2)
    before = {k: v.clone() for k, v in inputs.items()}
    model = wrapped(family)
    with model.hooks([("*", lambda x, hook: (x.mul_(0.9), None)[1])]):
        model(inputs)
        model.generate(inputs, **GREEDY)
    assert inputs.keys() == before.keys() and all(torch.equal(inputs[k], before[k]) for k in inputs)


def test_embeddings_in_place_of_tokens(family):
    model = wrapped(family)
    ids = torch.arange(20, 30)[None]
    embeds = model.hf_model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    resolved = model.resolve({"inputs_embeds": embeds, "attention_mask": mask})
    assert (resolved.batch, resolved.length) == (1, 10)
    with torch.no_grad():
        by_ids = model({"input_ids": ids, "attention_mask": mask})
        assert torch.equal(model({"inputs_embeds": embeds, "attention_mask": mask}), by_ids)
        before = embeds.clone()
        for name in ("hook_embed", "blocks.0.hook_resid_pre"):
            with model.hooks([(name, in_place(name))]):
                assert not torch.equal(model({"inputs_embeds": embeds, "attention_mask": mask}), by_ids)
        assert torch.equal(embeds, before)  # the caller's
    with pytest.raises(LayoutError, match="without `input_ids` have no token kinds"):
        resolved.masks("visual")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_positions_of_a_bare_mapping(family, side):
    model, inputs = wrapped(family), model_inputs(family, 1, 2, False, side)
    masks = model.resolve(inputs).masks
    real = inputs["attention_mask"].bool()
    ids = torch.tensor(model.family.visual_token_ids(model.hf_model.config))
    assert torch.equal(masks("padding"), ~real)
    assert torch.equal(masks("visual"), torch.isin(inputs["input_ids"], ids))
    assert torch.equal(masks("text"), real & ~masks("visual"))
    lengths = real.sum(1)
    expected = torch.zeros_like(real)
    for row, n in zip(expected, lengths.tolist(), strict=True):
        row[n - 1 if side == "right" else -1] = True
    assert torch.equal(masks("last"), expected)
    with pytest.raises(LayoutError, match="no token layout: 'question' is not among .*Make a sample"):
        masks("question")


def test_a_sample_has_all_positions_and_errors_name_it(family):
    model = wrapped(family)
    sample = model.prepare("What is this?", images=tiny_image(), videos=(tiny_frames(4), 2.0), id="one")
    resolved = model.resolve(sample)
    assert resolved.ids == ("one",) and resolved.length == len(sample) and resolved.batch == 1
    assert torch.equal(resolved.masks("question"), sample.mask("question"))
    assert model.resolve(dict(sample.inputs)).ids == (None,)


def test_a_cache_of_keys_excuses_missing_pixels():
    """A later step of a generation done by hand holds no pixels any more."""
    model, inputs = wrapped("internvl"), model_inputs("internvl")
    past = DynamicCache()
    with torch.no_grad():
        whole = model(inputs)
        first = {k: v[:, :-2] if v.dim() == 2 else v for k, v in inputs.items()}
        model({**first, "past_key_values": past}, use_cache=True)
        last = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
        rest = model({**last, "past_key_values": past}, use_cache=True)
    torch.testing.assert_close(rest, whole[:, -2:], atol=1e-4, rtol=1e-4)


# -- one input or several ------------------------------------------------------------------------------------------


def test_what_is_one_input_and_what_is_several(family):
    model = wrapped(family)
    sample = model.prepare("What is it?", images=tiny_image())
    batch = SampleBatch.collate([sample, sample])
    feature = BatchFeature(dict(batch.inputs))
    for single in (sample, batch, dict(sample.inputs), feature):
        assert is_model_input(single) and sample_count(single) == 1
        assert len(as_samples(single)) == 1 and as_samples(single)[0] is single
        assert [id(s) for s in each_sample([single, sample])] == [id(single), id(sample)]
    several = [sample, batch, feature]
    assert not is_model_input(several) and sample_count(several) == 3 and sample_count(iter(several)) is None
    for collection in (several, tuple(several), iter(several), dict(enumerate(several)).values()):
        assert [id(s) for s in as_samples(collection)] == [id(s) for s in several]
    assert [sequence_count(s) for s in several] == [1, 2, 2]
    assert [samples_of(s) for s in several] == [(sample,), (sample, sample), ()]
    assert [tensors_of(s) for s in several] == [sample.inputs, batch.inputs, feature]


def test_samples_are_made_as_they_are_needed():
    made = []

    def source():
        for number in range(3):
            made.append(number)
            yield {"input_ids": torch.tensor([[40 + number]])}

    samples = each_sample(source())
    assert made == []
    assert int(next(samples)["input_ids"]) == 40 and made == [0]


def test_batches_are_taken_apart_where_layouts_are_needed():
    one, two = (wrapped("internvl").prepare(text) for text in ("a", "b"))
    assert list(each_prepared([one, SampleBatch.collate([two, one]), two])) == [one, two, one, two]
    assert list(each_prepared(two)) == [two]
    with pytest.raises(InputError, match="Expected samples, as .*got BatchFeature. A plain mapping .* no token layout"):
        list(each_prepared([one, BatchFeature(dict(two.inputs))]))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [("text", "str"), (b"a", "bytes"), (None, "NoneType"), (3, "int"), (torch.zeros(2), "Tensor"), (len, "builtin_")],
    ids=repr,
)
def test_what_holds_no_inputs_is_rejected_at_once(wrong, name):
    message = f"^Expected a Sample, a SampleBatch, a mapping of model inputs, or an iterable of these; got {name}"
    for coerce in (each_sample, as_samples, each_prepared):
        with pytest.raises(InputError, match=f"{message}.*`model.prepare"):
            inspect.unwrap(coerce)(wrong)
    for elements in ([wrong], [{"input_ids": torch.tensor([[40]])}, wrong]):
        with pytest.raises(InputError, match=f"mapping of model inputs for sample {len(elements) - 1}; got {name}"):
            inspect.unwrap(as_samples)(elements)


def test_no_sample_is_rejected():
    for nothing in ([], iter(()), {}.values()):
        with pytest.raises(InputError, match="^There is no sample to count: `samples` is empty.$"):
            as_samples(nothing, "count")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3)}, r"`inputs_embeds` must be a tensor \[batch pos d_model\].*got \(1, 3\)"),
        ({"input_ids": 3}, r"`input_ids` must be a tensor \[batch pos\].*got int"),
        ({}, "hold no `input_ids`; they hold nothing"),
    ],
)
def test_sequences_that_cannot_be_counted(inputs, message):
    with pytest.raises(InputError, match=message):
        sequence_count(inputs)
