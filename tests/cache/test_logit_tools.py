"""The logit lens and attributions to logits, against the model's own logits."""

import pytest
import torch

from helpers.cache_witness import batch, close, film, hooked, sample, text_sample
from hooked_mllm.errors import InputError

MAKES = [sample, batch, film, text_sample]


def test_the_lens_ends_in_the_models_own_logits(family):
    model, inputs = hooked(family), batch(family)
    logits, cache = model.run_with_cache(inputs)
    lens, labels = cache.logit_lens(slice(None), return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"] and lens.shape == (4, *logits.shape)
    close(lens[-1], logits)
    close(lens[1], model.lm_head(model.ln_final(cache["resid_pre", 1])))
    last = cache.logit_lens()
    place = inputs.mask("last").int().argmax(1)
    close(last[-1, :, 0], logits[torch.arange(2), place])
    assert len(cache.logit_lens(incl_mid=True)) == 7
    question = cache.logit_lens("question")
    for b in range(2):
        mask = inputs.mask("question")[b]
        close(question[-1, b, : int(mask.sum())], logits[b, mask])
        assert question[:, b, int(mask.sum()) :].isnan().all()  # of no position, so of no value
    counts = inputs.mask("question").sum(1)
    attributions = cache.logit_attrs(cache.decompose_resid(), 7, positions="question")
    assert counts[0] != counts[1] and not attributions[:, int(counts.argmax())].isnan().any()
    assert attributions[:, int(counts.argmin()), int(counts.min()) :].isnan().all()


@pytest.mark.parametrize("make", MAKES)
def test_attributions_sum_to_the_logit_and_to_differences(family, make):
    model, inputs = hooked(family), make(family)
    logits, cache = model.run_with_cache(inputs)
    bias = 0 if model.lm_head.bias is None else 1
    assert bias == 0
    last = logits[inputs.mask("last")]
    tokens = torch.arange(len(last)) + 30
    for stack in (cache.decompose_resid(), cache.stack_head_results(incl_remainder=True)):
        attrs = cache.logit_attrs(stack, 7)
        assert attrs.shape == (len(stack), len(last), 1) and attrs.dtype == torch.float32
        close(attrs.sum(0)[:, 0], last[:, 7], 1e-4)
        close(cache.logit_attrs(stack, tokens).sum(0)[:, 0], last.gather(1, tokens[:, None])[:, 0], 1e-4)
        close(
            cache.logit_attrs(stack, tokens, 9).sum(0)[:, 0], last.gather(1, tokens[:, None])[:, 0] - last[:, 9], 1e-4
        )
        everywhere = cache.logit_attrs(stack, 7, positions=slice(None))
        close(everywhere.sum(0), logits[..., 7], 1e-4)


def test_tokens_as_text(family):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family))
    stack = cache.decompose_resid()
    word = model.processor.tokenizer.convert_tokens_to_ids("a")
    assert torch.equal(cache.logit_attrs(stack, "a"), cache.logit_attrs(stack, word))
    with pytest.raises(InputError, match="tokens; expected one"):
        cache.logit_attrs(stack, "zebra crossing")
    for wrong in (model.cfg.d_vocab, -1, [1, 2]):
        with pytest.raises(InputError):
            cache.logit_attrs(stack, wrong)
