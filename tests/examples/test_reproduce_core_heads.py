"""A quick reproduction on one toy: numbers against plain transformers, generated sentences against the numbers."""

import copy
import json
import math
import re

import pytest
import torch

from helpers import toy_witness
from helpers.example_script import import_example
from hooked_mllm.toys import VisualRetrieval

TOY, N = "toy-qwen3-vl", 4
ALL = VisualRetrieval(seed=0, pages=4, filler=48)


@pytest.fixture(scope="module")
def script():
    return import_example("reproduce_core_heads")


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """A finished run: its folder, and its results."""
    out = tmp_path_factory.mktemp("core-heads")
    assert script.main(["--quick", "--quiet", "--samples", str(N), "--toys", TOY, "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())["toys"][0]


def pairs(names):
    return [tuple(map(int, re.fullmatch(r"L(\d+)H(\d+)", name).groups())) for name in names]


def test_ram_and_accuracies_are_those_of_plain_transformers(run):
    _, found = run
    ranked_on, held_out = list(ALL.examples(N)), list(ALL.examples(N, start=10_000))
    ram = torch.tensor(found["domains"]["4 pages + 48 words"]["ram"])
    witness = toy_witness.retrieval_attention_mass(ranked_on, TOY)
    torch.testing.assert_close(ram.double(), witness, atol=1e-4, rtol=1e-3)
    order = witness.flatten().argsort(descending=True, stable=True).tolist()
    order = [divmod(i, witness.shape[1]) for i in order]
    assert pairs(found["top"]) == order[:4]
    ablation = found["ablation"]
    assert ablation["ks"] == [0, 4, 16] and ablation["n_samples"] == N
    for i, k in enumerate((0, 4, 16)):
        assert ablation["top"]["mean"][i] == toy_witness.accuracy(held_out, order[:k], name=TOY)
    bottom = pairs(found["bottom"])
    assert found["domains"]["4 pages + 48 words"]["accuracy"]["bottom"] == toy_witness.accuracy(
        held_out, bottom, name=TOY
    )
    one = list(VisualRetrieval(seed=0, pages=1, filler=0).examples(N, start=10_000))
    assert found["domains"]["1 page"]["accuracy"]["clean"] == toy_witness.accuracy(one, name=TOY)


@torch.no_grad()
def test_key_tokens_are_those_of_eager_attention(run):
    _, found = run
    model, hold, covered = toy_witness.model(attention="eager", name=TOY), [], []
    order = torch.tensor(found["domains"]["4 pages + 48 words"]["ram"]).flatten().argsort(descending=True, stable=True)
    for e in ALL.examples(N, start=10_000):
        inputs = toy_witness.inputs([e], TOY)
        attention = torch.cat(model(**inputs, output_attentions=True, use_cache=False).attentions)  # [layer head q k]
        n_question = len(toy_witness.processor(TOY).tokenizer(e.question)["input_ids"])
        row = attention[:, :, -3 - n_question : -3].mean(2).flatten(0, 1)  # [layer*head key]
        visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].view(4, -1)
        target = visual[e.target.image, toy_witness.within_page(e, TOY)]
        most = row.topk(math.ceil(0.05 * row.shape[1])).indices
        inside = (most[:, :, None] == target).any(1)  # [layer*head target]
        hold.append(inside.double().mean(1))
        covered.append(inside[order].cummax(0).values.double().mean(1))
    by_head = torch.tensor(found["key_tokens"]["by_head"], dtype=torch.float64)
    torch.testing.assert_close(by_head.flatten(), torch.stack(hold).mean(0))
    got = torch.tensor(found["key_tokens"]["coverage"]["top"], dtype=torch.float64)
    torch.testing.assert_close(got, torch.stack(covered).mean(0))


def test_heads_are_ranked_on_other_samples_than_they_are_tested_on(run):
    curve = json.loads((run[0] / TOY / "ablation.json").read_text())
    ranked_on = curve["provenance"]["ranking"]["provenance"]["sample_ids"]
    assert len(ranked_on) == N and not set(ranked_on) & set(curve["provenance"]["sample_ids"])


def test_the_report_is_complete_and_states_the_results(run):
    out, found = run
    page = (out / "report.html").read_text()
    assert page.count("<img") == len(found["figures"]) >= 7
    assert set(re.findall(r'(?:src|href)="([^"]{1,30})', page)) >= {f"#{TOY}"}
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r'<img[^>]* src="([^"]+)"', page))
    text = re.sub(r"\s+", " ", page)
    for sentence in (s for section in found["findings"].values() for s in section):
        assert sentence.replace("'", "&#39;").replace("<", "&lt;") in text
    assert "planted model" in text and f"{found['ablation']['top']['mean'][1]:.1%}" in text
    assert not (out / TOY / "ablation.checkpoint").exists()


def test_results_are_reused_and_the_report_is_the_same(run, script, monkeypatch):
    out, _ = run
    before = (out / "report.html").read_bytes()
    monkeypatch.setattr(script, "measure_toy", None)  # called, it would raise
    arguments = ["--quick", "--quiet", "--samples", str(N), "--toys", TOY, "--out", str(out)]
    assert script.main(arguments) == 0
    assert (out / "report.html").read_bytes() == before
    with pytest.raises(TypeError):
        script.main([*arguments, "--seed", "1"])  # other settings: measured again
    (out / TOY / "maps.png").rename(out / TOY / "elsewhere.png")
    with pytest.raises(TypeError):
        script.main(arguments)
    (out / TOY / "elsewhere.png").rename(out / TOY / "maps.png")


def test_words_follow_the_numbers(run, script):
    found = copy.deepcopy(run[1])
    for domain in found["domains"].values():
        domain["top"] = found["planted"][::-1]
    words = {section: " ".join(sentences) for section, sentences in script.findings(found).items()}
    assert "exactly the planted ones" in words["maps"] and "free model" not in words["toy"]
    other = copy.deepcopy(found)
    other["domains"]["1 page"]["top"] = ["L0H0", "L2H5", "L2H6", "L2H7"]
    assert "1 page: 3 of 4" in script.findings(other)["maps"][0]
    other["planted"] = []
    assert "free model" in script.findings(other)["toy"][0] and "planted" not in script.findings(other)["maps"][0]
    other["ablation"]["ks"] = [0, 4, 16]
    for name, mean in (("top", [1.0, 0.95, 0.9]), ("bottom", [1.0, 0.5, 0.1]), ("random", [1.0, 1.0, None])):
        other["ablation"][name]["mean"] = mean
    top, others, between = script.findings(other)["ablation"]
    assert "still has 90.0% of 100.0%" in top and "unlike in the paper" in top
    assert "bottom heads up to k = 0 (50.0% at 4)" in others and "random heads up to k = 4 (the last" in others
    assert "Unlike in the paper, bottom heads matter more than random ones (by up to 50.0%, at k = 4)" in between
    in_bottom = max(sum(f"L{layer}H" in name for name in found["bottom"]) for layer in range(6))
    assert re.search(
        rf"At k = 4 the bottom ones include [1-{in_bottom}] of the 8 heads of layer \d, the random", between
    )
    other["ablation"]["bottom"]["mean"] = [1.0, 1.0, 1.0]
    other["ablation"]["random"]["mean"] = [1.0, 0.8, 0.6]
    assert "by up to 40.0%, at k = 4 and 16), as in the paper" in script.findings(other)["ablation"][2]
    other["key_tokens"]["ratio"] = {"top": 0.1, "bottom": 0.2}
    assert "unlike in the paper, they have no more" in script.findings(other)["ratio"][0]
    other["key_tokens"]["coverage"] = {"top": [0.2, 0.7, 0.8], "bottom": [0.1, 0.1, 0.8], "random": [0.75, 0.8, 0.8]}
    sentence = (
        "cover 80.0% of the target's tokens; to cover 70% it takes 2 heads from the top, 3 heads from the bottom, 1 he"
    )
    assert sentence in script.findings(other)["coverage"][0]
    other["key_tokens"]["coverage"]["top"][2] = 0.6
    assert "cover 60.0% of the target's tokens and never reach 70%" in script.findings(other)["coverage"][0]
    other["ablation"]["top"]["mean"], other["ablation"]["moved"] = [1.0, 0.1, 0.1], [[0, 3, 9]]
    assert "Of the 4 random heads compared with them 3 had to come" in script.findings(other)["ablation"][0]
    other["ablation"]["moved"] = [[0, 0, 9]]
    assert "random heads compared" not in script.findings(other)["ablation"][0]
    other["maps"]["half"] = [0.5, 0.2]
    assert "unlike the paper's maps" in script.findings(other)["maps"][1]


def test_arguments_that_cannot_be(script, tmp_path, capsys):
    assert script.main(["--toys", "toy-other", "--out", str(tmp_path)]) == 1
    assert "expected a bundled checkpoint" in capsys.readouterr().err
    assert script.main(["--samples", "1", "--out", str(tmp_path)]) == 1
    assert "--samples >= 2" in capsys.readouterr().err and not list(tmp_path.iterdir())
