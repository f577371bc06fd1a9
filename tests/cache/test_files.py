"""Cache files: what was written is what is read, what is shared is written once, and nothing else is read at all."""

import errno
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.cache_witness import batch, film, hooked, sample, text_sample
from helpers.tiny import tiny_model
from hooked_mllm import ActivationCache, HookedMLLM
from hooked_mllm.cache import GenerationCache
from hooked_mllm.cache.lazy import LazyPattern, LazyResult
from hooked_mllm.errors import CacheFileError, HookedMLLMError, InputError, LayoutError
from hooked_mllm.storage import files


def same(a, b) -> None:
    assert list(a) == list(b)
    for name in a:
        assert type(a.entry(name)) is type(b.entry(name)), name
        exact = isinstance(a.entry(name), torch.Tensor)  # NaN where a sample of the batch lacks a position
        tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(a[name], b[name], **tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("make", [sample, batch, film, text_sample])
def test_round_trip_of_everything(family, make, tmp_path):
    inputs = make(family)
    _, cache = hooked(family).run_with_cache(inputs)
    cache.save(tmp_path / "cache.safetensors")
    again = ActivationCache.load(tmp_path / "cache.safetensors", model=hooked(family))
    same(again, cache)
    assert isinstance(again.entry(("pattern", 0)), LazyPattern) and isinstance(again.entry(("result", 0)), LazyResult)
    question = cache.pattern(1, "question", [2, -1])  # NaN where a sample has fewer tokens
    torch.testing.assert_close(again.pattern(1, "question", [2, -1]), question, equal_nan=True)
    assert torch.equal(again.decompose_resid(), cache.decompose_resid())
    assert torch.equal(again.logit_lens(), cache.logit_lens())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        {"queries": "question"},
        {"keys": "visual"},
        {"queries": "question", "keys": "visual"},
        {"pos_slice": slice(-3, None)},
        {"names_filter": "blocks.*hook_result"},
    ],
)
def test_round_trip_of_parts(family, options, tmp_path):
    _, cache = hooked(family).run_with_cache(batch(family), **options)
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    same(again, cache)
    if "queries" in options:
        torch.testing.assert_close(again.pattern(0, "question"), cache.pattern(0, "question"), equal_nan=True)
        with pytest.raises(LayoutError, match="did not keep"):
            again.pattern(0, queries="visual")


def test_round_trip_without_a_batch_axis_and_of_one_sample(family, tmp_path):
    _, cache = hooked(family).run_with_cache(sample(family), remove_batch_dim=True)
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert not again.has_batch_dim
    same(again, cache)
    for side in ("left", "right"):
        one = hooked(family).run_with_cache(batch(family, side))[1].sample(1)
        one.save(tmp_path / side)
        same(ActivationCache.load(tmp_path / side), one)


def test_round_trip_of_windows_and_other_masks(tmp_path):
    slid = tiny_model("llava_onevision")
    slid.config.text_config.sliding_window = 6
    slid.config.text_config.layer_types = ["full_attention", *["sliding_attention"] * 2]
    language_model = slid.model.language_model
    language_model.has_sliding_layers = True
    for layer, block in enumerate(language_model.layers):
        kind = "sliding_attention" if layer else "full_attention"
        block.attention_type, block.self_attn.sliding_window = kind, 6 if layer else None
    model = HookedMLLM.from_model(slid, check=False)
    ids = torch.arange(200, 240).view(2, 20)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    mask = torch.ones(2, 1, 20, 20).tril().bool()
    mask[1, :, 10:, 5:8] = False
    for attention_mask in (None, padding, mask):
        _, cache = model.run_with_cache({"input_ids": ids, "attention_mask": attention_mask}, "blocks.*")
        cache.save(tmp_path / "c")
        same(ActivationCache.load(tmp_path / "c"), cache)
        same(ActivationCache.load(tmp_path / "c").sample(1), cache.sample(1))


def test_half_precision_and_shared_tensors_are_written_as_they_are(tmp_path):
    model = hooked("qwen3_vl", dtype=torch.bfloat16)
    _, cache = model.run_with_cache(sample("qwen3_vl").to(dtype=torch.bfloat16))
    cache.save(tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("blocks.0.attn.hook_z").dtype == torch.bfloat16
    # q and k of pattern and scores, and z of the results, stand in the file once
    for kind in ("q", "k"):
        assert sum(n.startswith("blocks.0.attn.") and n.endswith(f"/{kind}") for n in names) == 1
    assert sum(n.startswith("blocks.0.attn.") and n.endswith(("hook_z", "/z")) for n in names) == 1
    same(ActivationCache.load(tmp_path / "c"), cache)


def test_a_file_holds_no_pattern(tmp_path):
    held = {}
    for n in (512, 1024):
        inputs = {"input_ids": torch.arange(n)[None] % 200 + 200}
        _, cache = hooked("internvl", layers=1).run_with_cache(inputs, ["*hook_pattern", "*hook_result"])
        cache.save(tmp_path / "c")
        held[n] = (tmp_path / "c").stat().st_size
    assert held[1024] < 2 * held[512]


def test_what_needs_the_model_is_an_error_that_names_it(tmp_path):
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"))
    cache.save(tmp_path / "c")
    with pytest.raises(InputError, match=r"model=model"):
        ActivationCache.load(tmp_path / "c").logit_lens()
    with pytest.raises(LayoutError, match=r"no positions of kind 'system'.*question"):
        ActivationCache.load(tmp_path / "c").pattern(0, queries="system")


# -- what is not a cache file ----------------------------------------------------------------------------------------


def spoil(kind: str, path, cache) -> None:
    cache.save(path)
    data = path.read_bytes()
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"blocks.0.attn.hook_z": [1.0]}))
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps({"blocks.0.attn.hook_z": [1.0]}, protocol=2))
    elif kind == "torch.save":
        torch.save({"blocks.0.attn.hook_z": torch.ones(2)}, path)
    elif kind == "other safetensors":
        save_file({"weight": torch.ones(3)}, path)
    elif kind == "other header":
        save_file({"weight": torch.ones(3)}, path, metadata={"hooked_mllm": json.dumps([1, 2])})
    elif kind == "other format":
        header = {"format": "hooked_mllm.ActivationCache/99", "generation": False, "steps": []}
        save_file({}, path, metadata={"hooked_mllm": json.dumps(header)})
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "scrambled":
        path.write_bytes(data[:8] + bytes(b ^ 255 for b in data[8:64]) + data[64:])
    elif kind == "text":
        path.write_text("not a cache")
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "tensors gone":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({"one": torch.ones(1)}, path, metadata=metadata)


KINDS = {
    "pickle": "is a pickle, which this library never loads",
    "old pickle": "is a pickle, which this library never loads",
    "torch.save": "is a pickle, which this library never loads",
    "other safetensors": "holds something else; expected 'hooked_mllm.ActivationCache/1'",
    "other header": "holds something else; expected 'hooked_mllm.ActivationCache/1'",
    "other format": r"ActivationCache/99'; expected 'hooked_mllm.ActivationCache/1",
    "cut": "damaged",
    "empty": "damaged",
    "scrambled": "damaged",
    "text": "damaged",
    "missing": "cannot be read: No such file",
    "folder": "cannot be read: Is a directory",
    "tensors gone": "damaged",
}


@pytest.mark.parametrize(("kind", "message"), KINDS.items())
def test_what_is_not_a_cache_file_is_rejected_and_not_run(kind, message, tmp_path):
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "blocks.*")
    path = tmp_path / "cache"
    spoil(kind, path, cache)
    for load in (ActivationCache.load, GenerationCache.load):
        with pytest.raises(CacheFileError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value) and isinstance(caught.value, HookedMLLMError)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_not_run(tmp_path):
    (tmp_path / "c").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CacheFileError, match="never loads"):
        ActivationCache.load(tmp_path / "c")


# -- altered files ---------------------------------------------------------------------------------------------------

ALTERED = {"causal": False, "window": 3, "q_offset": 2, "kv_length": 7, "scale": 2.0, "segments": [4, 4]}


def alter(path, *, digest: bool, **values) -> None:
    """Another value in the header of every pattern; `digest`: whether the file keeps its digest."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["hooked_mllm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    patterns = [e for step in header["steps"] for e in step["entries"].values() if e["kind"] == "pattern"]
    assert patterns
    for entry in patterns:
        entry.update(values)
    if not digest:
        del header["digest"]
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps(header)})


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_mask_is_rejected(family, name, tmp_path):
    _, cache = hooked(family).run_with_cache(sample(family), "*hook_pattern")
    cache.save(tmp_path / "c")
    alter(tmp_path / "c", digest=True, **{name: ALTERED[name]})
    with pytest.raises(CacheFileError, match="does not match the digest"):
        ActivationCache.load(tmp_path / "c")


def test_an_altered_step_of_a_generation_is_rejected(tmp_path):
    _, steps = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "*hook_pattern", generate={"max_new_tokens": 2})
    steps.save(tmp_path / "g")
    alter(tmp_path / "g", digest=True, causal=False)
    with pytest.raises(CacheFileError, match="does not match the digest"):
        GenerationCache.load(tmp_path / "g")


def test_files_of_earlier_versions_have_no_digest(tmp_path):
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"))
    cache.save(tmp_path / "c")
    alter(tmp_path / "c", digest=False)
    with pytest.warns(UserWarning, match="no digest"):
        same(ActivationCache.load(tmp_path / "c"), cache)
    for name, value in (("window", 0), ("window", -3), ("q_offset", -1), ("q_offset", 10**6), ("streaming", {})):
        cache.save(tmp_path / "c")
        alter(tmp_path / "c", digest=False, **{name: value})
        with pytest.raises(CacheFileError, match="is damaged"), pytest.warns(UserWarning, match="no digest"):
            ActivationCache.load(tmp_path / "c")


# -- writing whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), CacheFileError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_save_that_is_interrupted_leaves_what_was_there(tmp_path, monkeypatch, error, raised):
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "blocks.*")
    path = tmp_path / "cache"

    def half(tensors, name, metadata):
        assert name != str(path)
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", half)
        with pytest.raises(raised):
            cache.save(path)
    assert list(tmp_path.iterdir()) == []
    cache.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(raised):
        cache.save(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_the_folder_is_made_or_the_path_is_rejected_before_tensors_are_copied(tmp_path, monkeypatch):
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "blocks.*hook_z")
    cache.save(str(tmp_path / "new" / "folder" / "c"))
    same(ActivationCache.load(str(tmp_path / "new" / "folder" / "c")), cache)
    monkeypatch.setattr("hooked_mllm.cache.files._Writer", lambda: pytest.fail("tensors were gathered"))
    (tmp_path / "file").write_text("kept")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "c", "a part of the path is a file")):
        for save in (cache.save, GenerationCache([cache]).save):
            with pytest.raises(CacheFileError, match=message):
                save(path)
    with pytest.raises(InputError, match=r"Expected the path of a file.*got 3\."):
        cache.save(3)
