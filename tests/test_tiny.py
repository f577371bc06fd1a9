"""The tiny models must be worth testing on: unlike each other by seed, with attention far from uniform."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import coordinates
from helpers.tiny import ALL_FAMILIES, FAMILIES, save_tiny, tiny_inputs, tiny_model, tiny_processor
from helpers.tiny_text import SPECIAL


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(("images", "batch", "video"), [(1, 1, False), (2, 2, False), (0, 1, True), (1, 2, True)])
def test_every_kind_of_input_runs(family, images, batch, video):
    with torch.no_grad():
        logits = tiny_model(family)(**tiny_inputs(family, images, batch, video)).logits
    assert logits.shape[0] == batch
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_is_not_uniform_and_the_seed_matters(family):
    inputs = tiny_inputs(family)
    with torch.no_grad():
        out = tiny_model(family, attn="eager")(**inputs, output_attentions=True)
        other = tiny_model(family, seed=1)(**inputs)
        same = tiny_model(family)(**inputs)
    last_row = torch.stack(out.attentions)[:, 0, :, -1]  # [layer head key]
    assert last_row.amax(-1).mean() > 4 / last_row.shape[-1]
    assert (other.logits - out.logits).abs().max() > 0.1
    torch.testing.assert_close(same.logits, out.logits, atol=1e-4, rtol=1e-4)


def test_a_family_without_a_processor_is_named(monkeypatch):
    assert all(coordinates.real(family) for family in FAMILIES)
    message = "no processor for family 'other': add it to real\\(\\) and to SPECIAL in tiny_text.py"
    with pytest.raises(ValueError, match=message):
        coordinates.real("other")
    monkeypatch.setitem(SPECIAL, "other", SPECIAL["internvl"])
    with pytest.raises(ValueError, match=message):
        coordinates.real("other")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_saved_tiny_checkpoint_loads_by_the_ordinary_path(family, tmp_path):
    save_tiny(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = tiny_inputs(family)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny_model(family)(**inputs).logits)
    assert type(processor) is type(tiny_processor(family))
    assert processor.tokenizer("What é?").input_ids == tiny_processor(family).tokenizer("What é?").input_ids
