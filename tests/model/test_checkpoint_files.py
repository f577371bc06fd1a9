"""Files of checkpoints: safetensors, in their folder, of known types; everything else is rejected by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoint_folders import KEY, META, edit_json, rewrite
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.model.loading import load_model


def shard(folder: Path, names=("a.safetensors", "b.safetensors")) -> Path:
    """Two files of weights and their index, for the one file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[number % 2] for number, key in enumerate(weights)}
    for name in set(names):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({k: weights[k] for k in weights if weight_map[k] == name}, folder / name, metadata=META)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def point(index: Path, name: object) -> None:
    """Let one weight of the index be in another file."""
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))


# -- where an index leads --------------------------------------------------------------------------------------------


def test_shards_in_the_folder_are_read(saved, folder):
    shard(folder)
    states = [load_model(each)[0].state_dict() for each in (saved, folder)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "weights.safetensors.bin", None, 7, ["a"]])
def test_an_index_that_names_a_pickle(folder, name):
    index = shard(folder)
    torch.save({}, folder / "pytorch_model.bin")
    point(index, name)
    with pytest.raises(UnsupportedModelError, match=r"index.json of .* others than safetensors are pickles"):
        load_model(folder)


def test_a_config_that_names_a_pickle(folder):
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"config.json of .* has its weights in 'adapter_model.bin'"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE"])
@pytest.mark.parametrize("by", ["index", "config"])
def test_weights_outside_the_folder(folder, tmp_path, name, by):
    index = shard(folder)
    shutil.copy(folder / "a.safetensors", tmp_path / "outside.safetensors")
    name = name.replace("ABSOLUTE", str(tmp_path / "outside.safetensors"))
    if by == "index":
        point(index, name)
    else:
        edit_json(folder / "config.json", transformers_weights=name)
    with pytest.raises(InputError, match=r"which is outside it"):
        load_model(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "config.json", "tokenizer.json", "sub"])
def test_links_out_of_the_folder(folder, tmp_path, name):
    shard(folder, ("a.safetensors", "sub/b.safetensors"))
    (folder / name).symlink_to((folder / name).rename(tmp_path / "outside"))
    with pytest.raises(InputError, match=r"which is outside it\. Copy the files"):
        load_model(folder)


def test_links_in_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "stored.safetensors")
    (folder / "model.safetensors").symlink_to("stored.safetensors")
    (tmp_path / "link").symlink_to(folder)
    load_model(tmp_path / "link")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected a dictionary"),
        ('{"metadata": {}}', "expected a weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"x": "a.safetensors"}}', "expected a weight_map and metadata"),
        ('{"metadata": {}, "weight_map": {"x": "c.safetensors"}}', "'c.safetensors', which is not there"),
    ],
    ids=["deep", "list", "no-map", "empty", "no-metadata", "missing-file"],
)
def test_a_damaged_index(folder, content, message):
    shard(folder).write_text(content)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_weight_in_two_files(folder):
    shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "c.safetensors")
    point(folder / "model.safetensors.index.json", "c.safetensors")
    with pytest.raises(InputError, match=r"is in a.safetensors and c.safetensors"):
        load_model(folder)


# -- a folder of the cache of the hub --------------------------------------------------------------------------------


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """A cache of the hub with one model, whose files are links to blobs, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "models--org--name"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    shutil.move(folder, home / "blobs")
    for file in (home / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_a_model_in_the_cache_is_read(cached):
    model, processor = load_model("org/name", cache_dir=cached.parents[2])
    assert processor is not None
    again, _ = load_model(cached)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert load_model(cached, revision="0" * 40)[0] is not None
    with pytest.raises(InputError, match="neither a folder nor found on the hub"):
        load_model("org/name", cache_dir=cached.parents[2], revision="other")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../../../outside.safetensors"])
def test_an_index_in_the_cache(cached, name):
    blobs = cached.parents[1] / "blobs"
    index = shard(blobs)
    (cached / "model.safetensors").unlink()
    for file in (index, blobs / "a.safetensors", blobs / "b.safetensors"):
        (cached / file.name).symlink_to(Path("../../blobs") / file.name)
    load_model("org/name", cache_dir=cached.parents[2])
    point(index, name)
    with pytest.raises((InputError, UnsupportedModelError), match=r"others than safetensors|outside it"):
        load_model("org/name", cache_dir=cached.parents[2])


# -- weights that are not the model's --------------------------------------------------------------------------------


def test_mismatched_sizes(folder):
    rewrite(folder, lambda weights: weights.update({KEY: torch.zeros(3, 3)}))
    with pytest.raises(InputError, match="ignore_mismatched_sizes out"):
        load_model(folder, ignore_mismatched_sizes=True)
    with pytest.raises(InputError, match=r"cannot be loaded: [\s\S]*(mismatch|size)"):
        load_model(folder, ignore_mismatched_sizes=False)


def test_fewer_layers_than_weights(folder):
    config = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=config | {"num_hidden_layers": 1})
    with pytest.raises(InputError, match=r"weights that Qwen3VL\w+ does not have, such as .*layers\.1\."):
        load_model(folder)


def test_a_weight_of_no_module(folder):
    rewrite(folder, lambda weights: weights.update(extra=torch.zeros(3)))
    with pytest.raises(InputError, match="has 1 weights that .* such as extra"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_type(folder, dtype):
    rewrite(folder, lambda weights: weights.update({KEY: weights[KEY].to(dtype)}))
    with pytest.raises(InputError, match=f"The weight '{KEY}' .* is of type (I|U|BOOL|F8).*expected F64, F32"):
        load_model(folder)


@pytest.mark.parametrize("settings", [{"quant_method": "no-such"}, {"bits": 4}, {}, "awq8", 7])
def test_an_unknown_quantization(folder, settings):
    edit_json(folder / "config.json", quantization_config=settings)
    with pytest.raises(UnsupportedModelError, match="which transformers does not have"):
        load_model(folder)


@pytest.mark.parametrize("revision", ["main", "no-such", "", "0" * 40])
def test_the_revision_of_a_folder(folder, revision):
    with pytest.raises(InputError, match=r"revision= is a branch, tag or commit of the hub"):
        HookedMLLM.from_pretrained(str(folder), revision=revision)
    with pytest.raises(InputError, match=r"revision= is a branch, tag or commit of the hub"):
        HookedMLLM.from_pretrained("toy-qwen3-vl", revision=revision)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"subfolder": "x"}, "subfolder= is of the hub"),
        ({"gguf_file": "x.gguf"}, "Only safetensors"),
        ({"state_dict": {}}, "state_dict= out"),
        ({"torch_dtype": "float32"}, "torch_dtype= out: specify the type with dtype="),
        ({"adapter_kwargs": {}}, "adapter_kwargs= out"),
        ({"return_dict": False}, "return_dict= out: results of the model are read by name"),
        ({"_fast_init": False}, "_fast_init= out: it is no option"),
        ({"from_tf": True}, "from_tf= out: it is no option"),
        ({"from_flax": True}, "from_flax= out: it is no option"),
        ({"no_such_option": 1}, "cannot be loaded: .*no_such_option"),
        ({"variant": "fp16"}, r"no model.fp16.safetensors or model.safetensors.index.fp16.json"),
    ],
)
def test_options_of_transformers(saved, option, message):
    with pytest.raises((InputError, UnsupportedModelError), match=message):
        load_model(saved, **option)


# -- json that is nested too deeply ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"],
)
def test_deeply_nested_json(folder, name):
    (folder / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match="cannot be (read|loaded)"):
        load_model(folder)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_next_to_the_weights(folder, saved, monkeypatch):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"adapter_config.json without adapter_model.safetensors"):
        load_model(folder)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors", metadata=META)
    monkeypatch.setattr("hooked_mllm.model.loading.is_peft_available", lambda: False)
    with pytest.warns(UserWarning, match=r"contains an adapter .* not loaded, because peft is not installed"):
        model, _ = load_model(folder)
    assert torch.equal(model.lm_head.weight, load_model(saved)[0].lm_head.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft calls it
def test_an_adapter_that_peft_loads(folder, saved):
    import peft

    base, _ = load_model(saved)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"contains an adapter .* loaded\. Remove it .*merge_and_unload"):
        model, _ = load_model(folder)
    weights = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert weights and all(not p.requires_grad for p in model.parameters())
    expected = dict(adapted.get_base_model().named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    rewrite(folder, lambda state: state.pop(KEY))  # the report of the weights is not that of the adapter
    with pytest.raises(InputError, match=f"lacks 1 of the weights .*{KEY}"):
        load_model(folder)


def test_a_folder_with_only_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no config.json, but an adapter: .*merge_and_unload"):
        load_model(tmp_path)
