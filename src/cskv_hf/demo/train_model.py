"""Train the bundled model from scratch on a CPU: ``python -m cskv_hf.demo.train_model --out DIR``.

A 4-layer GQA Llama learns line retrieval (evaluate/lines.py) and the standard library's prose (corpus.py). Its first
two layers start with the wiring of an induction circuit (see `wire_induction`), the number of lines grows by half
whenever the right line is found four times in five, and text joins in when records have 42 lines. Matrices are
optimised by Muon in float32 (Jordan et al. 2024; torch's own runs its Newton-Schulz steps in bfloat16, hopeless on
most CPUs), everything else by AdamW. The state is saved every 100 steps, and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cskv_hf.demo.corpus import library_docstrings, reference_topics
from cskv_hf.evaluate.lines import line_record

VOCAB_SIZE = 2048
PHRASE = ": REGISTER_CONTENT is <"
LONG = 16  # lines from which on records carry several questions, and whole answers are labels
QUESTIONS = 8
MAX_ROWS = 64
RAISE_AT = 0.8
TEXT_LENGTH = 512
TEXT_WEIGHT = 1.0
MUON_LR, ADAM_LR = 0.006, 2e-3
LOOK_BACK, MATCH, COPY = 0.18, 5.0, 1.0  # gains of the circuit that training starts from
# words, numbers in threes, punctuation, spaces: the split of Llama 3
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Recipe:
    """What is trained on what; by default the bundled model.

    Attributes:
        tokens: of retrieval per step, and of text.
        first_lines, max_lines: of the first records and of the longest.
        text_at: lines of a record from which on text joins in.
        sizes: fields of the model's `LlamaConfig` that differ from the bundled one's.
    """

    steps: int = 700
    tokens: int = 6000
    seed: int = 0
    first_lines: int = 2
    max_lines: int = 128
    text_at: int = 42
    sizes: dict[str, Any] = field(default_factory=dict)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The fixed words of a record are one token, so that 100 lines fit into 900 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    numbers = " ".join([str(n) for n in range(1000)] + [f"{n:02d}" for n in range(100)]) + "\n"
    record = line_record(100, 1, random.Random(0))
    bpe.train_from_iterator(
        documents + [numbers] * 300 + [record.text + record.question(0)] * 20,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - 1,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    tokenizer.add_tokens([PHRASE])
    return tokenizer


def make_model(**sizes: Any) -> LlamaForCausalLM:
    """A 4-layer Llama, 2 KV heads x 64, whose first two layers start with the wiring of an induction circuit.

    Args:
        sizes: other fields of its `LlamaConfig`.
    """
    fields = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(LlamaConfig(**(fields | sizes))).float()
    wire_induction(model)
    return model


@torch.no_grad()
def wire_induction(model: LlamaForCausalLM) -> None:
    """Start layers 0 and 1 as a retrieval circuit; training may do with it what it likes.

    Retrieval needs three parts before any of them is of use: to know the token before, the token before that, and to
    match one with the other. From random weights nearly every run of this size stays on the saddle in front of that
    (right half of the time on two lines, for thousands of steps). The hidden state starts as four orthogonal parts:
    one common component, the token (all that is left, among it a code of 12 to be matched and one of 20 to be copied),
    and room for the codes of the tokens one and two places back (12 each). Layer 0 fills that room with two heads that
    look a fixed distance back; layer 1 matches what precedes this token with what lies two back elsewhere, and this
    token with what precedes others, and copies what it finds. The codes are short because they set how far the keys
    and values of layer 1 can be compressed: 24 and 20 of 128 channels in the bundled model. Gains are those of its
    sizes, hidden 128 and heads of 64; where there are more heads, the others start at random.
    """
    hidden, dim = model.config.hidden_size, model.config.head_dim
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    match, copied, rest = slice(1, 13), slice(13, 33), slice(33, hidden - 24)  # codes of a token, and free channels
    before, before_that = slice(hidden - 24, hidden - 12), slice(hidden - 12, hidden)
    embedding, layers = model.model.embed_tokens.weight, model.model.layers
    half, fast, width, num_copied = dim // 2, 5, 12, 20
    gain = (hidden / 128) ** 0.5  # of the norm, on a state of the same length
    for part in (match, copied, rest):
        embedding[:, part] = 0.4 * F.normalize(torch.randn(embedding.shape[0], part.stop - part.start), dim=-1)
    embedding[:, 0] = 0.7
    embedding[:, before.start :] = 0

    # Scores of queries and keys made of the common component depend on the distance only:
    # sum over fast f of cos(inv_freq[f] * (distance - offset)). That component is 8 of 11.3 after the norm.
    attention = layers[0].self_attn
    size = (16.0 * dim**0.5 / fast) ** 0.5 / (8.0 * gain)
    inv_freq = model.model.rotary_emb.inv_freq[:fast]
    for head, (offset, target) in enumerate(((1, before), (2, before_that))):
        kv_rows, rows = _rows(head // shared, dim), _rows(head, dim)
        attention.k_proj.weight[kv_rows] = 0
        attention.k_proj.weight[kv_rows][:fast, 0] = size
        attention.v_proj.weight[kv_rows] = 0
        attention.v_proj.weight[kv_rows][:width, match] = torch.eye(width)
        attention.q_proj.weight[rows] = 0
        attention.q_proj.weight[rows][:fast, 0] = size * (inv_freq * offset).cos()
        attention.q_proj.weight[rows][half : half + fast, 0] = -size * (inv_freq * offset).sin()
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[target, rows][:, :width] = torch.eye(width) * LOOK_BACK / gain

    attention, strength = layers[1].self_attn, MATCH * (dim / 64) ** 0.25 / gain
    slow = torch.cat([torch.arange(half - 6, half), torch.arange(dim - 6, dim)])  # hardly turn within a record
    for kv_head, (asks, answers) in enumerate(((before, before_that), (match, before))):
        kv_rows, rows = _rows(kv_head, dim), _rows(kv_head * shared, dim)
        attention.q_proj.weight[rows] = 0
        attention.k_proj.weight[kv_rows] = 0
        attention.q_proj.weight[rows.start + slow, asks] = strength * torch.eye(width)
        attention.k_proj.weight[kv_rows.start + slow, answers] = strength * torch.eye(width)
        attention.v_proj.weight[kv_rows] = 0
        attention.v_proj.weight[kv_rows][:num_copied, copied] = torch.eye(num_copied)
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[copied, rows][:, :num_copied] = torch.eye(num_copied) * COPY / (gain * (1 + kv_head))


def _rows(head: int, head_dim: int) -> slice:
    return slice(head_dim * head, head_dim * (head + 1))


def orthogonalize(gradient: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, in float32 (Muon's quintic coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient / (gradient.norm() + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose matrix updates are orthogonalised; for 2-D weights inside the layers."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def retrieval_batch(tokenizer, num_lines: int, tokens: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, each followed by questions and answers; only answers are labels. All rows have the same length.

    Short records come in many rows with one question each; until records are long, only the value is a label.
    """
    rows, labels, used = [], [], 0
    while used < tokens and len(rows) < MAX_ROWS:
        record = line_record(num_lines, num_lines, rng)
        ids = tokenizer(record.text)["input_ids"]
        target = [-100] * len(ids)
        for i in rng.choices(range(num_lines), k=1 if num_lines < LONG else QUESTIONS):
            question = tokenizer(record.question(i))["input_ids"]
            answer = tokenizer(record.answer(i))["input_ids"]
            ids = ids + question + answer
            target = target + [-100] * len(question)
            target += answer if num_lines >= LONG else [-100] * (len(answer) - 3) + answer[-3:-1] + [-100]
        rows.append(ids)
        labels.append(target)
        used += len(ids)
    return torch.tensor(rows), torch.tensor(labels)


def first_token_accuracy(logits: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, phrase: int) -> float:
    """Share of answers with the right token after `phrase`, the value's first: whether the line was found."""
    asked = (ids[:, :-1] == phrase) & (labels[:, 1:] != -100)
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean())


class Run:
    """A training run: model, optimisers and progress, saved to and continued from a folder."""

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe = out, recipe
        torch.manual_seed(recipe.seed)
        self.model = make_model(**recipe.sizes)
        # Muon's updates have full rank and would flatten the spectra that real keys and values have
        matrices = [
            p
            for name, p in self.model.model.layers.named_parameters()
            if p.ndim == 2 and not name.endswith(("k_proj.weight", "v_proj.weight"))
        ]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        self.muon = Muon(matrices, lr=MUON_LR)
        self.adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.state = {"seed": recipe.seed, "step": 0, "num_lines": recipe.first_lines}
        self.state |= dict.fromkeys(("accuracy", "text_loss", "seconds"), 0.0)
        if (out / "state.pt").exists():
            saved = torch.load(out / "state.pt", weights_only=True)
            self.state = saved["state"]
            self.model.load_state_dict(load_file(out / "training.safetensors"), strict=False)  # lm_head is tied
            self.muon.load_state_dict(saved["muon"])
            self.adam.load_state_dict(saved["adam"])

    def save(self) -> None:
        weights = {k: v.contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        save_file(weights, self.out / "training.tmp")
        state = {"state": self.state, "muon": self.muon.state_dict(), "adam": self.adam.state_dict()}
        torch.save(state, self.out / "state.tmp")
        (self.out / "training.tmp").rename(self.out / "training.safetensors")
        (self.out / "state.tmp").rename(self.out / "state.pt")


def train_step(run: Run, tokenizer, text: torch.Tensor, phrase: int) -> dict[str, float]:
    """One update on retrieval and, once records are long, text; returns what to log."""
    state, model, recipe = run.state, run.model, run.recipe
    step, steps, tokens = state["step"], recipe.steps, recipe.tokens
    rng = random.Random(state["seed"] * 1_000_003 + step)
    scale = min(1.0, (step + 1) / 30, (steps - step) / (0.3 * steps))
    run.muon.param_groups[0]["lr"], run.adam.param_groups[0]["lr"] = MUON_LR * scale, ADAM_LR * scale
    ids, labels = retrieval_batch(tokenizer, state["num_lines"], tokens, rng)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    accuracy = first_token_accuracy(logits.detach(), ids, labels, phrase)
    loss.backward()
    if state["num_lines"] >= recipe.text_at:
        starts = [rng.randrange(len(text) - TEXT_LENGTH) for _ in range(max(1, tokens // TEXT_LENGTH))]
        batch = torch.stack([text[s : s + TEXT_LENGTH] for s in starts])
        text_loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (TEXT_WEIGHT * text_loss).backward()
        state["text_loss"] += 0.05 * (float(text_loss.detach()) - state["text_loss"])
    for optimizer in (run.muon, run.adam):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state["accuracy"] += 0.1 * (accuracy - state["accuracy"])
    state["step"] = step + 1
    if state["accuracy"] > RAISE_AT and state["num_lines"] < recipe.max_lines:
        state["num_lines"] = min(recipe.max_lines, max(4, state["num_lines"] * 3 // 2))
        state["accuracy"] = 0.0
    return state | {"loss": float(loss.detach())}


def set_entries(path: Path, **entries: str | None) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}, indent=2) + "\n")


def train(out: Path, recipe: Recipe, stop_after: float) -> None:
    """Train to the recipe's end, saving to `out` on the way; the finished model is in ``out / "model"``."""
    out.mkdir(parents=True, exist_ok=True)
    documents = reference_topics(held_out=False) + library_docstrings()
    if not (out / "tokenizer.json").exists():
        train_tokenizer(documents).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    text = torch.tensor([t for document in documents for t in [*tokenizer(document)["input_ids"], 0]])
    phrase = tokenizer.convert_tokens_to_ids(PHRASE)
    run = Run(out, recipe)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{size:,} parameters, {len(text):,} tokens of text, from step {run.state['step']}", flush=True)
    started = time.monotonic() - run.state["seconds"]
    while run.state["step"] < recipe.steps:
        log = train_step(run, tokenizer, text, phrase)
        run.state["seconds"] = time.monotonic() - started
        step, over = run.state["step"], run.state["seconds"] > stop_after
        if step % 20 == 0:
            print(json.dumps({name: round(value, 4) for name, value in log.items()}), flush=True)
        if step % 100 == 0 or over or step == recipe.steps:
            run.save()
        if over:
            print("stopped at --stop-after; start again with the same --out to continue")
            return
    run.model.half()
    run.model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    set_entries(out / "model" / "config.json", dtype="float32")  # stored in 16 bits, loaded in 32 by dtype="auto"
    set_entries(out / "model" / "tokenizer_config.json", is_local=None, local_files_only=None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="tokens of retrieval per step, and of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, Recipe(args.steps, args.tokens, args.seed), args.stop_after)
