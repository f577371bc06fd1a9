"""Accuracy and retrieval heads of a toy, measured with plain transformers.

Run it on a checkpoint folder to measure again and update its `training.json`:

    python examples/toy_evaluation.py FOLDER [EXAMPLES]
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from toy_families import FAMILIES
from toy_videos import VIDEOS
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.video_utils import VideoMetadata

from hooked_mllm.heads import head_name
from hooked_mllm.storage import write_text
from hooked_mllm.toys import Example, VideoExample, VideoRetrieval, VisualRetrieval
from hooked_mllm.toys.render import CELL, GRID, VIDEO_CELL, VIDEO_GRID
from hooked_mllm.toys.task import PAGES
from hooked_mllm.toys.video_task import MOMENT_S, MOMENTS

Heads = Iterable[tuple[int, int]]
Batch = tuple[dict[str, Tensor], Int[Tensor, " sample"]]
HYBRID, SINK, WINDOW = "toy_hybrid", 4, 16


class Witness:
    """The checkpoint with plain transformers."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        self.family = FAMILIES[self.model.config.model_type]()
        self.videos = VIDEOS[self.model.config.model_type]()
        self.model.eval().to(device)
        self.device = device

    def inputs(self, examples: list[Example] | list[VideoExample]) -> dict[str, Tensor]:
        """A left-padded batch."""
        texts = []
        for e in examples:
            kinds = ["video"] if isinstance(e, VideoExample) else ["image"] * len(e.images)
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": e.question}]
            messages = [{"role": "system", "content": e.system or ""}, {"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        images = {"images": [[*e.images] for e in examples if isinstance(e, Example)]}
        batch = self.processor(text=texts, **(video_arguments(examples) or images), **options)
        return {name: tensor.to(self.device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}

    def batches(self, examples: list[Example] | list[VideoExample], size: int = 128) -> list[Batch]:
        """The examples as batches of model inputs, with the token ids of the answers."""
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        ids = self.processor.tokenizer.get_vocab()
        return [(self.inputs(part), torch.tensor([ids[e.answer] for e in part])) for part in parts]

    @torch.no_grad()
    def accuracy(self, batches: list[Batch], zeroed: Heads = ()) -> float:
        """Share of examples with the right colour as next token, with the z of some heads set to zero."""
        layers = self.model.model.language_model.layers
        handles = []
        for layer, head in zeroed:
            width = layers[layer].self_attn.head_dim

            def zero(module: nn.Module, args: tuple[Tensor], head: int = head, width: int = width) -> tuple[Tensor]:
                z = args[0].clone()  # [sample pos (head d_head)]
                z[..., head * width : (head + 1) * width] = 0
                return (z,)

            handles.append(layers[layer].self_attn.o_proj.register_forward_pre_hook(zero))
        right = []
        for inputs, answers in batches:
            logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
            right.append(logits.argmax(-1).cpu() == answers)
        for handle in handles:
            handle.remove()
        return torch.cat(right).double().mean().item()

    def target_tokens(self, e: Example | VideoExample) -> Int[Tensor, " token"]:
        """Positions in the prompt of the tokens that see the target's cell."""
        if isinstance(e, VideoExample):
            moment, (x, y, _, _) = int(e.target.start_s // MOMENT_S), e.target.box
            cell = int(y) // VIDEO_CELL * VIDEO_GRID + int(x) // VIDEO_CELL
            return self.videos.seen_by(int(len(e.video) / e.video.fps / MOMENT_S), cell)[moment]
        cell = int(e.target.y0) // CELL * GRID + int(e.target.x0) // CELL
        return self.family.seen_by(len(e.images), cell)[e.target.image]

    @torch.no_grad()
    def retrieval_attention_mass(
        self, examples: list[Example] | list[VideoExample], batch: int = 32
    ) -> Float[np.ndarray, "layer head"]:
        """Mean over question tokens of the attention on the target's tokens; needs eager attention."""
        total = 0.0
        for i in range(0, len(examples), batch):
            part = examples[i : i + batch]
            inputs = self.inputs(part)
            attentions = self.model(**inputs, output_attentions=True, use_cache=False).attentions
            pattern = torch.stack(attentions)  # [layer sample head query key]
            for sample, e in enumerate(part):
                start = int(inputs["attention_mask"][sample].argmax())  # left padding
                keys = start + self.target_tokens(e)
                # after the question: <|im_end|> <|im_start|> assistant
                n = len(self.processor.tokenizer(e.question)["input_ids"])
                question = pattern[:, sample, :, -3 - n : -3]  # [layer head query key]
                total = total + question[..., keys].double().sum(-1).mean(-1).cpu().numpy()
        return total / len(examples)


def video_arguments(examples: Sequence[Example | VideoExample]) -> dict[str, Any]:
    """The processor's arguments for the examples' videos with all frames; empty without videos."""
    videos = [e.video for e in examples if isinstance(e, VideoExample)]
    if not videos:
        return {}
    indices = [[round(t * video.fps) for t in video.times_s] for video in videos]
    metadata = [
        VideoMetadata(total_num_frames=len(video), fps=video.fps, frames_indices=frames, width=video.width,
                      height=video.height, duration=len(video) / video.fps)
        for video, frames in zip(videos, indices, strict=True)
    ]  # fmt: skip
    to_channels_first = "frame row col channel -> frame channel row col"
    frames = [rearrange(torch.from_numpy(video.frames), to_channels_first).contiguous() for video in videos]
    options = {"input_data_format": "channels_first", "do_sample_frames": False}
    return {"videos": frames, "video_metadata": metadata, "videos_kwargs": options}


class Hybrid:
    """Attention in which all heads but the `dense` ones see only the first `SINK` and the last `WINDOW` tokens."""

    def __init__(self, dense: Heads) -> None:
        self.dense = set(dense)
        AttentionInterface.register(HYBRID, self)
        AttentionMaskInterface.register(HYBRID, eager_mask)

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos d_head"],
        attention_mask: Float[Tensor, "batch 1 pos pos"],
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
        """The attention of one layer."""
        groups = query.shape[1] // key.shape[1]
        key, value = (repeat(x, "batch kv pos d -> batch (kv group) pos d", group=groups) for x in (key, value))
        mask = attention_mask.expand(-1, query.shape[1], -1, -1).clone()
        position = (mask[:, 0, -1] == 0).cumsum(-1) - 1  # [batch pos], padding not counted
        near = (position[:, :, None] - position[:, None] < WINDOW) | (position[:, None] < SINK)  # [batch query key]
        for head in range(query.shape[1]):
            if (module.layer_idx, head) not in self.dense:
                mask[:, head].masked_fill_(~near, torch.finfo(mask.dtype).min)
        z = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return z.transpose(1, 2), None


def ranking(scores: Float[np.ndarray, "layer head"]) -> list[tuple[int, int]]:
    """Heads from the highest score to the lowest."""
    return [divmod(int(i), scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]


def evaluate(folder: Path, device: torch.device, n: int) -> dict[str, Any]:
    """Accuracy by page count and precision, the RAM map, and accuracy on four pages with heads zeroed or streaming."""
    witness = Witness(folder, device, torch.float32)
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in witness.model.parameters())}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report |= {"examples": n, "evaluated_on": f"{machine}, transformers {transformers.__version__}"}
    tasks = {pages: VisualRetrieval(seed=1000, pages=pages) for pages in PAGES}
    held_out = {pages: witness.batches(list(task.examples(n))) for pages, task in tasks.items()}
    report["accuracy_float32"] = {str(p): round(witness.accuracy(held_out[p]), 4) for p in PAGES}
    half = Witness(folder, device, torch.bfloat16)
    report["accuracy_bfloat16"] = {str(p): round(half.accuracy(held_out[p]), 4) for p in PAGES}
    eager = Witness(folder, device, torch.float32, attention="eager")
    scores = eager.retrieval_attention_mass(list(VisualRetrieval(seed=1001).examples(min(n, 256))))
    order, four = ranking(scores), held_out[4]
    report["ram"] = np.round(scores, 4).tolist()
    report["ram_top"] = {head_name(*head): round(float(scores[head]), 4) for head in order[:6]}
    report["zeroed"] = {"none": report["accuracy_float32"]["4"]}
    report["zeroed"] |= {f"top-{k} by RAM": round(witness.accuracy(four, order[:k]), 4) for k in (1, 2, 4, 8)}
    report["zeroed"]["bottom-8 by RAM"] = round(witness.accuracy(four, order[-8:]), 4)
    for seed in range(3):
        others = np.random.default_rng(seed).permutation(len(order) - 4)[:8] + 4
        report["zeroed"][f"random-8, top-4 excluded, seed {seed}"] = round(
            witness.accuracy(four, [order[i] for i in others]), 4
        )
    report |= {"hybrid_sink": SINK, "hybrid_window": WINDOW, "hybrid": {}}
    for name, dense in {"none": [], "bottom-4 by RAM": order[-4:]}.items():
        report["hybrid"][name] = hybrid_accuracy(witness, dense, four)
    for k in (1, 2, 4):
        report["hybrid"][f"top-{k} by RAM"] = hybrid_accuracy(witness, order[:k], four)
    return report | {"video": evaluate_videos(witness, half, eager, n, order)}


def evaluate_videos(
    witness: Witness, half: Witness, eager: Witness, n: int, by_pages: list[tuple[int, int]]
) -> dict[str, Any]:
    """The same on videos, with heads zeroed in the order of their RAM on the videos and on the pages."""
    tasks = {moments: VideoRetrieval(seed=1000, moments=moments) for moments in MOMENTS}
    held_out = {moments: witness.batches(list(task.examples(n))) for moments, task in tasks.items()}
    report: dict[str, Any] = {"accuracy_float32": {str(m): round(witness.accuracy(held_out[m]), 4) for m in MOMENTS}}
    report["accuracy_bfloat16"] = {str(m): round(half.accuracy(held_out[m]), 4) for m in MOMENTS}
    scores = eager.retrieval_attention_mass(list(VideoRetrieval(seed=1001).examples(min(n, 256))))
    order, longest = ranking(scores), held_out[MOMENTS[-1]]
    report["ram"] = np.round(scores, 4).tolist()
    report["ram_top"] = {head_name(*head): round(float(scores[head]), 4) for head in order[:6]}
    report["zeroed"] = {"none": report["accuracy_float32"][str(MOMENTS[-1])]}
    for name, ranked in {"on videos": order, "on pages": by_pages}.items():
        report["zeroed"][f"top-4 by RAM {name}"] = round(witness.accuracy(longest, ranked[:4]), 4)
        report["zeroed"][f"bottom-8 by RAM {name}"] = round(witness.accuracy(longest, ranked[-8:]), 4)
    return report


def hybrid_accuracy(witness: Witness, dense: Heads, batches: list[Batch]) -> float:
    """Accuracy if only the `dense` heads see all tokens."""
    Hybrid(dense)
    witness.model.set_attn_implementation({"text_config": HYBRID})
    accuracy = witness.accuracy(batches)
    witness.model.set_attn_implementation({"text_config": "sdpa"})
    return round(accuracy, 4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    path = folder / "training.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    curve = report.pop("curve", [])
    report |= evaluate(
        folder,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 512,
    )
    write_text(path, json.dumps(report | {"curve": curve}, indent=None, separators=(", ", ": ")) + "\n")
    print(json.dumps(report, indent=1))
