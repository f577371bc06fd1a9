"""Another attention in the body of a `with`: by name, by a user's function, and what is neither."""

import pytest
import torch

from helpers.wrapped import model_inputs, plain, wrapped
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.model.attention_methods import split_attention


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


# -- other attention ---------------------------------------------------------------------------------------------------


def own_attention(q, k, v, mask, scale, layer):
    """A user's backend: eager attention over the rows of the model's mask."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask.full()[:, None], torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("tower", ["text", "vision"])
@torch.no_grad()
def test_a_named_implementation_runs_in_the_body_of_a_with(family, tower):
    inputs, model = model_inputs(family, 2, 2), wrapped(family)
    reference = plain(family, "eager") if tower == "text" else plain(family)
    key = {f"{t}_config": "eager" if t == tower else "sdpa" for t in ("text", "vision")}
    own = {name: getattr(reference.config, name)._attn_implementation for name in key}
    reference.set_attn_implementation(key)
    with model.attention("eager", tower=tower):
        assert torch.equal(model(inputs), reference(**inputs).logits)
        hooked, _ = model.run_with_cache(inputs)
        assert torch.equal(hooked, reference(**inputs).logits)
    reference.set_attn_implementation(own)
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_users_own_backend_equals_eager(family, tower, side):
    inputs, model = model_inputs(family, 2, 2, False, side), wrapped(family)
    layers, real = [], inputs["attention_mask"].bool()

    def backend(q, k, v, mask, scale, layer):
        layers.append(layer)
        return own_attention(q, k, v, mask, scale, layer)

    with model.attention(backend, tower=tower):
        got = model(inputs)
        with_hook = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)])
    close(got[real], plain(family, "eager")(**inputs).logits[real])
    count = model.cfg.n_layers if tower == "text" else model.cfg.vision_n_layers
    assert layers == [*range(count)] * 2
    assert (with_hook - got)[real].abs().max() > 0.01
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@torch.no_grad()
def test_backends_nest_and_leave_when_the_body_raises(family):
    inputs, model = model_inputs(family), wrapped(family)

    def zero(q, k, v, mask, scale, layer):
        return torch.zeros_like(q.transpose(1, 2))

    with pytest.raises(KeyboardInterrupt), model.attention(own_attention):
        with model.attention(zero):
            nothing = model(inputs)
        close(model(inputs), plain(family)(**inputs).logits)
        assert (nothing - model(inputs)).abs().max() > 0.1
        raise KeyboardInterrupt
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda q: q, r"returned \[1, 4, \d+, 8\] in layer 0"),  # [batch head query d_head], as SDPA gives it
        (lambda q: (q, None), "returned a tuple"),
        (lambda q: q.transpose(1, 2)[:, 1:], r"returned \[1, \d+, 4, 8\]"),
    ],
)
@torch.no_grad()
def test_a_backend_that_returns_another_shape_is_rejected(returned, got):
    inputs, model = model_inputs("qwen3_vl"), wrapped("qwen3_vl")
    with model.attention(lambda q, k, v, mask, scale, layer: returned(q)):
        with pytest.raises(HookValueError, match=rf"{got}.*expected z \[batch query head d_head\].*transpose"):
            model(inputs)
    assert torch.equal(model(inputs), plain("qwen3_vl")(**inputs).logits)


@torch.no_grad()
def test_generation_under_a_backend(family):
    inputs, model = model_inputs(family), wrapped(family)
    with model.attention(own_attention):
        got = model.generate(inputs, max_new_tokens=4, do_sample=False)
    expected = plain(family, "eager").generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (lambda q, k, v: q, "too many positional arguments"),
        (lambda q, k, v, mask, scale, layer, other: q, "missing a required argument: 'other'"),
        (lambda q, k, v, mask, scale, *, layer: q, "too many positional arguments"),
        (torch.nn.functional.scaled_dot_product_attention, "no signature"),
    ],
)
def test_a_backend_with_other_parameters_is_rejected_when_it_is_set(backend, reason):
    model = wrapped("internvl")
    with pytest.raises(HookValueError, match=rf"\(q, k, v, mask, scale, layer\); got .*{reason}"):
        with model.attention(backend):
            pytest.fail("entered")
    with model.attention(lambda *arguments, layer_name="": own_attention(*arguments)):
        close(model(model_inputs("internvl")), plain("internvl")(**model_inputs("internvl")).logits)


@torch.no_grad()
def test_patterns_of_a_backend_without_restrict_are_those_of_the_full_mask():
    """Documented: a backend whose heads see fewer keys needs `restrict`."""
    inputs, model = model_inputs("qwen3_vl"), wrapped("qwen3_vl")

    class Diagonal:
        """Every query sees its own key only."""

        def __call__(self, q, k, v, mask, scale, layer):
            return v.repeat_interleave(2, dim=1).transpose(1, 2)

    class Restricted(Diagonal):
        def restrict(self, q, k, mask, scale, layer):
            own_key = torch.eye(mask.kv_length, dtype=torch.bool)[-mask.q_length :]  # [query key]
            return MaskRows(mask.batch, mask.q_length, mask.kv_length, mask.device, dense=own_key[None, None])

    with model.attention(Diagonal()):
        logits, full = model.run_with_cache(inputs, "*hook_pattern")
    with model.attention(Restricted()):
        same_logits, restricted = model.run_with_cache(inputs, "*hook_pattern")
    assert torch.equal(logits, same_logits)
    assert (full["pattern", 1][..., -1, :] > 0).all()
    assert torch.equal(restricted["pattern", 1][0], torch.eye(full["pattern", 1].shape[-1]).expand(4, -1, -1))


def test_unknown_attention_is_rejected():
    model = wrapped("internvl")
    with pytest.raises(HookValueError, match="no attention implementation 'spda'"), model.attention("spda"):
        pytest.fail("entered")
    with pytest.raises(HookValueError, match="tower is 'text' or 'vision'; got 'ear'"), model.attention("eager", "ear"):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("choice", "names", "backends"),
    [
        (None, None, {}),
        ("eager", "eager", {}),
        (own_attention, None, {"text": own_attention}),
        ({"text": "sdpa", "vision": "eager"}, {"text": "sdpa", "vision": "eager"}, {}),
        ({"text": own_attention, "vision": "eager"}, {"vision": "eager"}, {"text": own_attention}),
        ({"vision": own_attention}, None, {"vision": own_attention}),
    ],
)
def test_names_go_to_transformers_and_functions_to_towers(choice, names, backends):
    assert split_attention(choice) == (names, backends)


def test_a_backend_for_a_tower_that_is_not_there():
    with pytest.raises(InputError, match=r"attention= is for 'text', 'vision' or both; got \['audio'\]"):
        split_attention({"audio": own_attention})
