"""Train the bundled model from scratch on a CPU: ``python -m cskv_hf.demo.train_model --out DIR``.

A 4-layer GQA Llama learns line retrieval (evaluate/lines.py) and the standard library's prose (corpus.py). Retrieval needs a
curriculum: the number of lines starts at two and grows by half whenever the running accuracy passes 0.8; text joins in when records
have 64 lines, since its larger gradients would otherwise hide the first signs of retrieval. Matrices are optimised by
Muon in float32 (Jordan et al. 2024; torch's own runs its Newton-Schulz steps in bfloat16, hopeless on most CPUs), everything else
by AdamW. The run saves its state every 100 steps and continues from it when started again with the same `--out`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cskv_hf.demo.corpus import library_docstrings, reference_topics
from cskv_hf.evaluate.lines import line_record

VOCAB_SIZE = 1024
MAX_LINES = 128
QUESTIONS = 8
TEXT_LENGTH = 512
PHRASE = ": REGISTER_CONTENT is <"
RAISE_AT = 0.8
TEXT_AT = 64
# words, single digits, punctuation, spaces: the usual byte-level split
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The fixed words of a record are one token, so that 100 lines fit into about 1,400 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    record = line_record(100, 1, random.Random(0))
    bpe.train_from_iterator(
        documents + [record.text + record.question(0)] * 20,
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


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config).float()


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

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def retrieval_batch(tokenizer, num_lines: int, tokens: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, each followed by questions and answers; only answers are trained on. All rows are equally long by construction.

    Short records get one question each and many rows: what has to be found out is how to use the key, and every record is one example of
    it. Until records are long, only the digits of the value are labels, so that the rest of the answer does not drown them.
    """
    questions = 1 if num_lines < 16 else QUESTIONS
    rows, labels, used = [], [], 0
    while used < tokens:
        record = line_record(num_lines, num_lines, rng)
        ids = tokenizer(record.text)["input_ids"]
        target = [-100] * len(ids)
        for i in rng.choices(range(num_lines), k=questions):
            question = tokenizer(record.question(i))["input_ids"]
            answer = tokenizer(record.answer(i))["input_ids"]
            before = (
                [-100] * (len(answer) - 6) if questions == 1 else answer[:-6]
            )  # the last six: five digits and ">\n"
            ids = ids + question + answer
            target = target + [-100] * len(question) + before + answer[-6:]
        rows.append(ids)
        labels.append(target)
        used += len(ids)
    return torch.tensor(rows), torch.tensor(labels)


def answer_loss(
    logits: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, phrase: int, rest_weight: float
) -> torch.Tensor:
    """Weighted mean cross entropy of the answers. The first digit of a value, after `phrase`, is the one that takes the key to find; the
    others follow from the digit before, and at full weight their noise hides it."""
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    weights = torch.where(ids[:, :-1] == phrase, 1.0, rest_weight) * (labels[:, 1:] != -100)
    return (losses * weights).sum() / weights.sum()


def first_digit_accuracy(logits: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, phrase: int) -> float:
    """Share of answers whose first digit is the most likely next token after `phrase`: that the right line was found."""
    asked = (ids[:, :-1] == phrase) & (labels[:, 1:] != -100)
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean())


def train(out: Path, steps: int, tokens: int, seed: int, stop_after: float) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    documents = reference_topics(held_out=False) + library_docstrings()
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(out)
    text = torch.tensor([t for doc in documents for t in tokenizer(doc)["input_ids"] + [0]])
    phrase = tokenizer.convert_tokens_to_ids(PHRASE)

    model = make_model()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices, lr=0.02)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    state = {"step": 0, "num_lines": 2, "accuracy": 0.0, "text_loss": 0.0, "seconds": 0.0}
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True)
        state = saved["state"]
        model.load_state_dict(load_file(out / "training.safetensors"), strict=False)  # lm_head is the embedding
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} tokens of text, from step {state['step']}"
    )
    started = time.monotonic() - state["seconds"]
    while state["step"] < steps:
        step = state["step"]
        rng = random.Random(seed * 1_000_003 + step)
        scale = min(1.0, (step + 1) / 30, (steps - step) / (0.3 * steps))
        for optimizer, lr in ((muon, 0.02), (adam, 3e-3)):
            optimizer.param_groups[0]["lr"] = lr * scale
        ids, labels = retrieval_batch(tokenizer, state["num_lines"], tokens, rng)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = answer_loss(
            logits, ids, labels, phrase, rest_weight=0.1 if step >= 90 and state["num_lines"] < 4 else 0.5
        )
        accuracy = first_digit_accuracy(logits.detach(), ids, labels, phrase)
        loss.backward()
        if state["num_lines"] >= TEXT_AT:
            starts = [rng.randrange(len(text) - TEXT_LENGTH) for _ in range(max(1, tokens // TEXT_LENGTH))]
            batch = torch.stack([text[s : s + TEXT_LENGTH] for s in starts])
            text_loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            text_loss.backward()
            state["text_loss"] += 0.05 * (float(text_loss.detach()) - state["text_loss"])
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["accuracy"] += 0.1 * (accuracy - state["accuracy"])
        state["step"], state["seconds"] = step + 1, time.monotonic() - started
        if state["accuracy"] > RAISE_AT and state["num_lines"] < MAX_LINES:
            state["num_lines"] = min(MAX_LINES, state["num_lines"] * 3 // 2)
            state["accuracy"] = 0.0
        if (step + 1) % 20 == 0:
            print(
                json.dumps({k: round(v, 4) for k, v in state.items()} | {"loss": round(float(loss.detach()), 4)}),
                flush=True,
            )
        over = state["seconds"] > stop_after
        if (step + 1) % 100 == 0 or over or step + 1 == steps:
            save_file(
                {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"},
                out / "training.tmp",
            )
            torch.save({"state": state, "muon": muon.state_dict(), "adam": adam.state_dict()}, out / "state.tmp")
            (out / "training.tmp").rename(out / "training.safetensors")
            (out / "state.tmp").rename(out / "state.pt")
        if over:
            print("stopped at --stop-after; start again with the same --out to continue")
            return
    model.half()
    model.config.dtype = torch.float32  # stored in 16 bits, loaded in 32 by the default dtype="auto"
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of retrieval per step, and of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.steps, args.tokens, args.seed, args.stop_after)
