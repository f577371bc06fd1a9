"""Loading by the ordinary path, and what is rejected."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from helpers.tiny import ALL_FAMILIES, save_tiny, tiny_inputs, tiny_model, tiny_processor
from hooked_mllm import toys
from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.model.loading import load_model

NATIVE = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @cache
    def folder(family: str) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture
def copy(saved, tmp_path):
    def fresh(family: str = "qwen3_vl") -> Path:
        return Path(shutil.copytree(saved(family), tmp_path / "copy"))

    return fresh


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_folder_gives_the_native_class_and_its_processor(family, saved):
    model, processor = load_model(saved(family))
    assert type(model).__name__ == NATIVE[family]
    assert type(processor) is type(tiny_processor(family))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    inputs = tiny_inputs(family)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny_model(family)(**inputs).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(saved, dtype):
    model, _ = load_model(str(saved("internvl")), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_checkpoint_decides_the_dtype_by_default(tmp_path):
    save_tiny("internvl", tmp_path, dtype=torch.float16)
    assert load_model(tmp_path)[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat61", "int8", torch.int8])
def test_an_unknown_dtype(saved, dtype):
    with pytest.raises(InputError, match="dtype is one of bfloat16, float16, float32, auto; got"):
        load_model(saved("qwen3_vl"), dtype=dtype)


def test_attention_for_each_tower(family, saved):
    def names(model):
        return model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation

    assert names(load_model(saved(family), attention="eager")[0]) == ("eager", "eager")
    mixed = load_model(saved(family), attention={"text": "eager", "vision": "sdpa"})[0]
    assert names(mixed) == ("eager", "sdpa")
    with pytest.raises(InputError, match=r"'text', 'vision' or both; got \['vison'\]"):
        load_model(saved(family), attention={"vison": "eager"})


def test_device_and_device_map(saved):
    assert load_model(saved("internvl"), device="cpu")[0].device == torch.device("cpu")
    assert load_model(saved("internvl"), device_map={"": "cpu"})[0].device == torch.device("cpu")
    with pytest.raises(InputError, match="device= or device_map=, not both"):
        load_model(saved("internvl"), device="cpu", device_map="auto")


def test_pickled_weights_are_rejected(copy):
    folder = copy()
    weights = load((folder / "model.safetensors").read_bytes())
    torch.save(weights, folder / "pytorch_model.bin")
    load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"weights in pytorch_model.bin, which are pickles"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="has no weights"):
        load_model(folder)


def test_code_of_the_checkpoint_never_runs(copy):
    folder = copy("internvl")
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"})
    assert type(load_model(folder)[0]).__name__ == NATIVE["internvl"]
    edit_config(folder, model_type="evil")
    with pytest.raises(UnsupportedModelError, match="needs its own code, which this package never runs"):
        load_model(folder)
    for kwargs in ({"trust_remote_code": True}, {"use_safetensors": False}):
        with pytest.raises(UnsupportedModelError, match=r"never run|can run code"):
            load_model(folder, **kwargs)


def test_the_old_internvl_layout_is_rejected_with_the_native_name(copy):
    folder = copy("internvl")
    edit_config(folder, model_type="internvl_chat", auto_map={"AutoConfig": "configuration_internvl_chat.C"})
    with pytest.raises(UnsupportedModelError, match=r"InternVLForConditionalGeneration.*'-HF'"):
        load_model(folder)


def test_another_model_is_rejected_with_the_list(copy):
    folder = copy()
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(folder)
    assert all(name in str(caught.value) for name in ("llama", "qwen3_vl", "llava_onevision", "internvl"))
    edit_config(folder, model_type="qwen3_vl", architectures=["Qwen3VLForEmbedding"])
    with pytest.raises(UnsupportedModelError, match="contains a Qwen3VLForEmbedding"):
        load_model(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "none", "", "~/none"])
def test_no_such_folder(name):
    with pytest.raises(InputError, match=r"No folder at .* no hub id either"):
        load_model(name)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" + "b" * 5000, "~nouser/x"], ids=["long", "long-id", "home"])
def test_names_that_are_no_paths(name):
    with pytest.raises(InputError, match=r"neither a path nor a hub id: "):
        load_model(name)


@pytest.mark.parametrize(
    "changes",
    [{"architectures": 3}, {"architectures": [None]}, {"architectures": "Qwen"}, {"model_type": ["x"]}],
    ids=str,
)
def test_a_config_of_other_types(copy, changes):
    folder = copy()
    edit_config(folder, **changes)
    with pytest.raises(InputError, match="model_type is a name and architectures a list of names; got"):
        load_model(folder)


@pytest.mark.parametrize("content", ["[]", '"x"', "3", "null"])
def test_a_config_that_is_no_dictionary(copy, content):
    folder = copy()
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config.json (of .* is damaged|that cannot be read)"):
        load_model(folder)


def test_a_folder_or_file_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"has no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match=r"config.json that cannot be read"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="is a file: give the folder"):
        load_model(tmp_path / "config.json")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="neither a folder nor found on the hub"):
        load_model("no-such-organisation/no-such-model")


def test_damaged_and_incomplete_weights(copy):
    folder = copy()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    weights = load(data)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"damaged|cannot be loaded"):
        load_model(folder)
    lost = "model.language_model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of the weights .* such as {lost}"):
        load_model(folder)


def test_without_processor_files_there_is_no_processor(copy):
    folder = copy()
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    model, processor = load_model(folder)
    assert processor is None
    assert type(model).__name__ == NATIVE["qwen3_vl"]


def test_a_broken_processor_is_an_error_that_names_it(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"The processor of .* cannot be loaded"):
        load_model(folder)


def test_the_bundled_toy_by_name():
    model, processor = load_model("toy-qwen3-vl")
    assert type(model).__name__ == NATIVE["qwen3_vl"]
    assert processor.chat_template
    assert Path(toys.path("toy-qwen3-vl")).is_dir()
