"""Sentences generated from the numbers of `core_heads_measure.py`, compared with those of the paper."""

from collections.abc import Sequence
from typing import Any

#: arXiv:2606.05843: figures 5a, 6a, 6b, 6c and section 4.3, on Qwen3-VL-4B and LLaVA-OneVision
PAPER = {
    "spearman": (0.79, 0.92),
    "ratio": {"LLaVA-OneVision": 0.144, "Qwen3-VL": 0.256, "bottom": 0.02},
    "ablation": {"Qwen3-VL": (45.3, 27.0), "LLaVA-OneVision": (16.4, 10.6)},
    "coverage": (50, 100, 0.70, 0.80),
}
ORDERS = {"top": "from the top", "bottom": "from the bottom", "random": "in random order"}
#: an accuracy has fallen if it is below this fraction of the way from chance to the clean model's accuracy
HALF = 0.5
#: accuracies at most this far below the clean one count as unchanged
KEPT = 0.05


def findings(r: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by section of the report."""
    return {
        "toy": [what_it_is(r), accuracies(r)],
        "maps": [found_planted(r), against_vision(r)],
        "stability": [tasks_agree(r), top_in_every_task(r)],
        "ablation": [top_falls(r), others_hold(r), bottom_or_random(r)],
        "ratio": [key_tokens(r)],
        "coverage": [coverage(r)],
        "overlays": [on_target(r)],
        "queries": [last_token(r)],
    }


def what_it_is(r: dict[str, Any]) -> str:
    if r["planted"]:
        return (
            f"This is a planted model: in training, {heads(r['planted'])} were the only heads that could attend beyond "
            "a local window. That they retrieve is a known ground truth for checking methods, not an emergent finding."
        )
    return (
        "This is a free model: training treated all heads alike. Which heads retrieve is a result of training, for "
        "this task, size and seed; one small model permits no conclusion about large ones."
    )


def accuracies(r: dict[str, Any]) -> str:
    parts = [f"{d['accuracy']['clean']:.1%} on {label}" for label, d in r["domains"].items()]
    return f"Accuracy on held-out examples: {', '.join(parts)}; chance is {r['chance']:.1%}."


def found_planted(r: dict[str, Any]) -> str:
    k, n = len(r["top"]), r["shape"][0] * r["shape"][1]
    if not r["planted"]:
        layers = sorted({int(name[1:].split("H")[0]) for name in r["top"]})
        where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        return f"RAM's top {k} of {n} heads are {heads(r['top'])}, in {where}."
    hits = {label: len(set(d["top"]) & set(r["planted"])) for label, d in r["domains"].items()}
    full = [label for label, count in hits.items() if count == len(r["planted"]) == k]
    if len(full) == len(hits):
        return f"RAM's top {k} of {n} heads are exactly the planted ones, in all {len(hits)} domains."
    counts = "; ".join(f"{label}: {count} of {len(r['planted'])}" for label, count in hits.items())
    return f"RAM's top {k} of {n} heads are not the planted ones in every domain ({counts})."


def against_vision(r: dict[str, Any]) -> str:
    m = r["maps"]
    ram, vision = m["half"]
    concentrated = "fewer" if ram < vision else "more" if ram > vision else "equally many"
    agrees = "as in the paper's maps" if ram < vision else "unlike the paper's maps"
    return (
        f"Half of all RAM is in {ram:.0%} of the heads, half of all VisionMass in {vision:.0%}: RAM is in "
        f"{concentrated} heads, {agrees}. The top {len(r['top'])} of the two share {m['overlap']:.0%}; "
        f"Spearman {m['spearman']:.2f}."
    )


def tasks_agree(r: dict[str, Any]) -> str:
    s, (low, high) = r["stability"], PAPER["spearman"]
    where = "within" if low <= s["least"] and s["most"] <= high else "partly outside"
    where = "above" if s["least"] > high else "below" if s["most"] < low else where
    return (
        f"Spearman correlations between the {len(s['tasks'])} tasks: {s['least']:.2f} to {s['most']:.2f}, {where} the "
        f"paper's {low} to {high}."
    )


def top_in_every_task(r: dict[str, Any]) -> str:
    s = r["stability"]
    share, n = 100 - s["percentile"], len(s["universal"])
    if not n:
        return f"No head is in the top {share:g} % of every task."
    text = f"In the top {share:g} % of every task: {heads(s['universal'])}."
    if r["planted"]:
        inside = len(set(s["universal"]) & set(r["planted"]))
        text += f" {inside} of {n} {'is' if n == 1 else 'are'} planted."
    return text


def top_falls(r: dict[str, Any]) -> str:
    a, chance = r["ablation"], r["chance"]
    clean, mean = a["top"]["mean"][0], a["top"]["mean"]
    middle = chance + HALF * (clean - chance)
    fallen = next((k for k, m in zip(a["ks"], mean, strict=True) if m < middle), None)
    intervals = zip(a["ks"], a["top"]["low"], a["top"]["high"], strict=True)
    at_chance = next((k for k, low, high in intervals if low is not None and low <= chance <= high), None)
    if fallen is None:
        text = f"Without its top {a['ks'][-1]} heads the model still has {mean[-1]:.1%} of {clean:.1%}: it does not "
        return text + "need the heads that RAM ranks first, unlike in the paper."
    text = f"Accuracy falls below {middle:.1%}, half-way to chance, without the top {fallen} head{'s' * (fallen > 1)}"
    text += f" ({mean[a['ks'].index(fallen)]:.1%}, from {clean:.1%})"
    if at_chance is not None:
        text += (
            f"; from {at_chance} on chance lies within the 95 % interval"
            if at_chance != fallen
            else (", where chance lies within the 95 % interval")
        )
    q, l = PAPER["ablation"]["Qwen3-VL"], PAPER["ablation"]["LLaVA-OneVision"]
    text += borrowed(a, fallen)
    return f"{text}. (The paper, without the top 5 heads: {q[0]} to {q[1]} on Qwen3-VL, {l[0]} to {l[1]} on LLaVA.)"


def borrowed(ablation: dict[str, Any], k: int) -> str:
    """A control from other layers does not separate the heads from their layer."""
    (moved, *_) = (row[ablation["ks"].index(k)] for row in ablation["moved"])  # the same for every seed
    if not moved:
        return ""
    return (
        f". Of the {k} random heads compared with them {moved} had to come from other layers, because the layers of "
        "the top heads have too few others: this control does not separate the heads from their layer"
    )


def others_hold(r: dict[str, Any]) -> str:
    parts = []
    for name in ("bottom", "random"):
        ks, mean = _known(r["ablation"], name)
        last = last_unchanged(ks, mean)
        end = "the last k measured" if last == ks[-1] else f"{mean[ks.index(last) + 1]:.1%} at {ks[ks.index(last) + 1]}"
        parts.append(f"{name} heads up to k = {last} ({end})")
    return f"Accuracy stays within {KEPT:.0%} of the clean one without {parts[0]}, and without {parts[1]}."


def bottom_or_random(r: dict[str, Any]) -> str:
    """The paper: accuracy falls less without bottom heads than without random ones."""
    bottom, random = (_known(r["ablation"], name) for name in ("bottom", "random"))
    shared = [k for k in random[0] if k in bottom[0] and k]
    gaps = [bottom[1][bottom[0].index(k)] - random[1][random[0].index(k)] for k in shared]
    least, most = min(gaps), max(gaps)
    at = [k for k, gap in zip(shared, gaps, strict=True) if abs(gap) > KEPT]
    if not at:
        return (
            f"Bottom and random heads differ by {max(abs(least), abs(most)):.1%} at most: the paper's finding that "
            "bottom heads matter less than random ones is not confirmed here."
        )
    if least >= -KEPT:
        return f"Bottom heads matter less than random ones (by up to {most:.1%}, at k = {listed(at)}), as in the paper."
    if most <= KEPT:
        return (
            f"Unlike in the paper, bottom heads matter more than random ones (by up to {-least:.1%}, at k = "
            f"{listed(at)}). {layers_of_bottom(r, at[0])}"
        )
    return f"Bottom heads matter less than random ones at some k and more at others ({least:+.1%} to {most:+.1%})."


def layers_of_bottom(r: dict[str, Any], k: int) -> str:
    """The layer with the largest excess of bottom heads over random ones."""
    i, a = r["ablation"]["ks"].index(k), r["ablation"]
    bottom, random = a["bottom"]["layers"][i], a["random"]["layers"][i]
    layer = max(sorted(bottom), key=lambda name: bottom[name] - random.get(name, 0))
    return (
        f"At k = {k} the bottom ones include {bottom[layer]} of the {r['shape'][1]} heads of layer {layer}, the random "
        f"ones {random.get(layer, 0)}: random heads are from the layers of the top heads here, from any in the paper."
    )


def key_tokens(r: dict[str, Any]) -> str:
    k, p = r["key_tokens"], PAPER["ratio"]
    top, bottom = k["ratio"]["top"], k["ratio"]["bottom"]
    agrees = "as in the paper, the top heads have more" if top > bottom else "unlike in the paper, they have no more"
    return (
        f"The top {len(r['top'])} heads have {top:.1%} of the target's tokens, on average, among their most attended "
        f"5 % of positions (half or more in {k['hit_rate']['top']:.0%} of the samples), the bottom ones {bottom:.1%}: "
        f"{agrees} (there {p['LLaVA-OneVision']:.1%} and {p['Qwen3-VL']:.1%} against about {p['bottom']:.0%}, for the "
        "top and bottom 15)."
    )


def coverage(r: dict[str, Any]) -> str:
    curves, (few, many, low, high) = r["key_tokens"]["coverage"], PAPER["coverage"]
    n = len(curves["top"])
    reach = {name: next((i + 1 for i, c in enumerate(curve) if c >= low), None) for name, curve in curves.items()}
    paper = f"the paper: the top {few} to {many} of about a thousand cover {low:.0%} to {high:.0%}"
    whole = f"All {n} heads together cover {curves['top'][-1]:.1%} of the target's tokens"
    if curves["top"][-1] < low:
        return f"{whole} and never reach {low:.0%} ({paper})."
    parts = [f"{k} heads {ORDERS[name]}" if k != 1 else f"1 head {ORDERS[name]}" for name, k in reach.items()]
    return f"{whole}; to cover {low:.0%} it takes {', '.join(parts)} ({paper})."


def on_target(r: dict[str, Any]) -> str:
    overlays = r["overlays"]
    top, bottom = (sum(o["share"][group] for o in overlays) / len(overlays) for group in ("top", "bottom"))
    even = sum(o["even"] for o in overlays) / len(overlays)
    return (
        f"In these pictures, {top:.1%} of the top heads' visual attention is on the target, {bottom:.1%} of the bottom "
        f"ones'; with uniform attention it would be {even:.1%}."
    )


def last_token(r: dict[str, Any]) -> str:
    q = r["queries"]
    question, last = q["top_mean"]
    return (
        f"With the last token of the prompt as query in place of the question's tokens, the top {len(r['top'])} are "
        f"{heads(q['tops'][1])}: {q['overlap']:.0%} of the question's top. Their mean RAM is {last:.3f} (question: "
        f"{question:.3f}); Spearman {q['spearman']:.2f} over all heads."
    )


def last_unchanged(ks: list[int], mean: list[float]) -> int:
    """The largest k up to which no mean is more than `KEPT` below the first."""
    last = ks[0]
    for k, m in zip(ks, mean, strict=True):
        if m < mean[0] - KEPT:
            break
        last = k
    return last


def _known(ablation: dict[str, Any], ranking: str) -> tuple[list[int], list[float]]:
    pairs = [(k, m) for k, m in zip(ablation["ks"], ablation[ranking]["mean"], strict=True) if m is not None]
    return [k for k, _ in pairs], [m for _, m in pairs]


def heads(names: list[str]) -> str:
    """Names in a sentence."""
    return listed(sorted(names))


def listed(values: Sequence[object]) -> str:
    """Values in a sentence: a, b and c."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last
