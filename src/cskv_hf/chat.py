"""A conversation in one cache: every turn reads what the cache kept of the turns before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer
from transformers.cache_utils import Cache

from .cache import CSKVCache
from .evaluate.memory import held_nbytes
from .families import context_length
from .generation import CACHE_ARGUMENT
from .model_shape import ModelShape, sliding_window, tokens_in_full_cache


def converse(new: Callable[[], Conversation]) -> None:
    """A conversation on the terminal, or with lines of the standard input, until one is empty or there are no more.

    Answers go to the standard output, all else to the error output. ``/cache`` shows what is held, ``/new`` starts
    over.
    """
    talk, interactive = new(), sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            talk = new()
        elif text == "/cache":
            print(talk.cache.report() if isinstance(talk.cache, CSKVCache) else talk.status())
        else:
            try:
                talk.say(text, StatusStreamer(talk, interactive and sys.stdout.isatty()))
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            except KeyboardInterrupt:
                print("(stopped)", file=sys.stderr)
                continue
            print(f"[{talk.status()}]\n", file=sys.stderr)


class Conversation:
    """Turns of a user and a model that share one cache.

    The history is rendered anew for every turn, with the tokenizer's chat template where it has one. What the cache
    holds of it stays; where a template renders earlier turns differently (some drop the model's reasoning), the cache
    is cut back to where they still agree.

    Args:
        model: with or without a CSKV adapter.
        make_cache: makes the cache that holds the conversation.
        generate: further arguments of `generate`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, make_cache: Callable[[], Cache], **generate: Any) -> None:
        self.model, self.tokenizer, self.make_cache, self.arguments = model, tokenizer, make_cache, generate
        self.messages: list[dict[str, str]] = []
        self.cache = make_cache()
        self.held: list[int] = []  # tokens that the cache has seen

    def say(self, text: str, streamer: TextStreamer | None = None) -> str:
        """One turn; returns the answer, and streams it on the way. An interrupted turn is as if it had not been.

        Raises:
            ValueError: if the conversation is longer than the model's context; nothing is changed then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._render(messages)
        room = context_length(self.model) - len(ids)
        if room < 1:
            raise ValueError(
                f"The conversation has {len(ids):,} tokens, the model's context {room + len(ids):,}. Start a new one."
            )
        agreed = next((i for i, (a, b) in enumerate(zip(self.held, ids)) if a != b), min(len(self.held), len(ids) - 1))
        self._cut_to(agreed)
        input_ids = torch.tensor([ids], device=self.model.device)
        arguments = self.arguments | {"max_new_tokens": min(room, self.arguments.get("max_new_tokens", room))}
        try:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **{CACHE_ARGUMENT: self.cache},
                streamer=streamer,
                **arguments,
            )
        except BaseException:  # an interrupted step leaves a cache that is no longer of one length
            self._start_over()
            raise
        self.held = output[0, : self.cache.get_seq_length()].tolist()
        answer = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _cut_to(self, tokens: int) -> None:
        """Let the cache hold the first `tokens` of the conversation only."""
        surplus = len(self.held) - tokens
        if surplus == 0:
            return
        try:
            self.cache.crop(-surplus)
            self.held = self.held[:tokens]
        except ValueError:  # beyond what sliding layers still hold
            self._start_over()

    def _start_over(self) -> None:
        """A new cache, which reads the whole conversation in the next turn."""
        self.cache, self.held = self.make_cache(), []

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            return list(
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            )
        text = "".join(message["content"] + "\n" for message in messages)  # a base model goes on with the text
        return list(self.tokenizer(text)["input_ids"])

    def status(self) -> str:
        """What the cache holds, and what a full one would."""
        return cache_status(self.cache, self.model)


def cache_status(cache: Cache, model: nn.Module) -> str:
    shape, tokens = ModelShape.from_model_config(model.config), cache.get_seq_length()
    if not tokens:
        return "empty"
    windows = (sliding_window(model.config, layer_idx) for layer_idx in range(shape.num_hidden_layers))
    full = sum(tokens_in_full_cache(tokens, w) for w in windows) * 2 * shape.kv_dim * model.dtype.itemsize
    held = held_nbytes(cache)
    return f"{tokens:,} tokens in {held:,} bytes, {100 * held / full:.0f} % of a full cache"


class StatusStreamer(TextStreamer):
    """Streams the answer, and shows what the cache holds in the title of the terminal as it grows."""

    def __init__(self, talk: Conversation, show: bool) -> None:
        super().__init__(talk.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.talk, self.show = talk, show

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.show:
            print(f"\033]0;cache: {self.talk.status()}\007", end="", flush=True)
