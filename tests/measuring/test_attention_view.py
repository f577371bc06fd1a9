"""AttentionView: masses, largest keys, chance and finiteness against NumPy."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import BUDGETS, CASES, random_layers
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import InputError, LayoutError, NumericsError
from hooked_mllm.measuring.attention_view import AttentionView


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_mass_sums_the_profile_over_the_keys(case):
    layers = random_layers(**case)
    mass = layers.view().mass("question", "target").numpy()
    target = layers.masks["target"].numpy()
    expected = (layers.profile("question") * target[None, :, None]).sum(-1)
    assert mass.dtype == np.float64
    np.testing.assert_allclose(mass, expected, atol=3e-6)


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_top_is_taken_over_the_sample_without_its_padding(case, share):
    layers = random_layers(**case)
    top = layers.view().top("question", share).numpy()
    profile = layers.view().profile("question").numpy()
    for b, padding in enumerate(layers.masks["padding"].numpy()):
        real = np.flatnonzero(~padding)
        k = int(np.ceil(round(share * len(real), 9)))
        for layer, head in np.ndindex(top.shape[0], top.shape[2]):
            order = real[np.argsort(-profile[layer, b, head, real], kind="stable")]
            assert set(np.flatnonzero(top[layer, b, head])) == set(order[:k])


def test_ties_go_to_the_lower_index_and_never_to_padding():
    # all keys alike: every visible key of the one query has the same weight
    n, masks = 12, {"padding": torch.arange(12)[None] < 3, "question": torch.arange(12)[None] == 11}
    mask = MaskRows(1, n, n, "cpu", causal=True, padding=~masks["padding"])
    q, k = torch.zeros(1, 2, n, 4), torch.zeros(1, 1, n, 4)
    top = AttentionView([0], [q], [k], [mask], [1.0], masks.__getitem__, 1).top("question", 0.4)
    assert top[0, 0].nonzero()[:, 1].tolist() == [3, 4, 5, 6] * 2  # ceil(0.4 * 9) = 4


def test_chance_is_target_tokens_over_visible_tokens():
    layers = random_layers(lengths=(23, 17), window=9)
    for budget in BUDGETS:
        chance = layers.view(max_bytes=budget).chance("question", "target").numpy()
        for layer in range(layers.n_layers):
            for b in range(2):
                seen = layers.attention[layer, b, 0] > 0
                target, question = (layers.masks[name][b].numpy() for name in ("target", "question"))
                expected = np.mean([(row & target).sum() / row.sum() for row in seen[question]])
                assert chance[layer, b] == pytest.approx(expected, abs=1e-6)  # of every head


def test_the_share_of_the_keys_among_the_largest():
    layers = random_layers(lengths=(23, 17))
    view = layers.view()
    top, target = view.top("question", 0.2).numpy(), layers.masks["target"].numpy()
    expected = (top & target[:, None]).sum(-1) / target.sum(-1)[:, None]
    np.testing.assert_allclose(view.top_share("question", "target", 0.2), expected, atol=1e-12)


def test_metrics_share_one_profile():
    view = random_layers().view()
    assert view.profile("question") is view.profile("question")
    assert view.top("question", 0.1) is view.top("question", 0.1)


def test_what_the_padding_holds_is_of_no_consequence():
    layers = random_layers(lengths=(23, 15), padding_side="left")
    expected = layers.view().profile("question").clone()
    for tensor in (*layers.q, *layers.k):
        tensor[1, :, :8] = torch.nan  # attention over nothing gives NaN in some backends; it stays there
    view = layers.view()
    assert torch.equal(view.profile("question"), expected)
    view.rows("question")
    view.check()


@pytest.mark.parametrize("use", ["profile", "rows"])
def test_nan_is_named_by_layer_head_and_sample(use):
    layers = random_layers(lengths=(23, 20))
    layers.q[2][1, 3, 20] = torch.nan  # a question token of the second sample
    view = layers.view()
    getattr(view, use)("question")
    with pytest.raises(NumericsError, match=r"1 heads is not finite, first at L2H3 \(sample 1\)"):
        view.check()


def test_is_last_and_masks():
    layers = random_layers()
    assert not layers.view(range(2)).is_last
    view = layers.view(range(1, 3))
    assert view.is_last and view.layers == (1, 2) and view.n_keys == 23 and view.n_heads == 4
    for name in ("question", "target", "visual", "answer", "last"):
        assert torch.equal(getattr(view, name), layers.masks[name])


def test_bad_input_is_rejected():
    layers = random_layers(lengths=(23, 20))
    view = layers.view()
    layers.masks["target"][1] = False
    with pytest.raises(LayoutError, match="'target' mask is empty for sample 1"):
        layers.view().mass("question", "target")
    with pytest.raises(LayoutError, match=r"\[batch pos\], here \[2, 23\]; got \[2, 22\]"):
        view.profile(torch.ones(2, 22, dtype=torch.bool))
    with pytest.raises(InputError, match="share of the keys"):
        view.top("question", 0.0)
    with pytest.raises(InputError, match=r"it returned \[3, 2, 4\]"):
        view.rows("question", reduce=lambda rows: rows.sum((-1, -2)))
    with pytest.raises(InputError, match="one q, k, mask and scale"):
        AttentionView([0, 1], layers.q, layers.k, layers.mask, layers.scale, layers.masks.__getitem__, 3)
    with pytest.raises(InputError, match="same positions"):
        shorter = [k[:, :, 1:] for k in layers.k]
        AttentionView(range(3), layers.q, shorter, layers.mask, layers.scale, layers.masks.__getitem__, 3)
