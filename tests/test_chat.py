"""A conversation in one cache: every turn goes on from what is held, also where a template rewrites the past."""

import pytest
import torch
from conftest import lossless, make_model
from transformers import DynamicCache

from cskv_hf import CSKVCache
from cskv_hf.chat import Conversation, StatusStreamer


class Letters:
    """A tokenizer of letters; its template drops what earlier answers said before a ``|``."""

    pad_token_id = 0
    chat_template = "yes"

    def __call__(self, text):
        return {"input_ids": [2 + ord(c) % 80 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(80 + i) for i in (ids.tolist() if torch.is_tensor(ids) else ids))

    def apply_chat_template(self, messages, add_generation_prompt=True, return_dict=True):
        text = "".join(f"[{m['role'][0]}]{self.render(m)}" for m in messages) + "[a]"
        return self(text)

    def render(self, message):
        return message["content"]


class Forgetful(Letters):
    def render(self, message):
        return message["content"][3:] if message["role"] == "assistant" else message["content"]


@pytest.mark.parametrize("tokenizer", [Letters(), Forgetful()], ids=["as it was", "answers rewritten"])
def test_turns_equal_a_full_cache_that_reads_everything_anew(tokenizer):
    """Lossless factors: a shared cache, cut back where needed, says what a fresh full cache does."""
    model = lossless(make_model())
    talk = Conversation(model, tokenizer, CSKVCache, max_new_tokens=12, do_sample=False)
    messages = []
    for text in ("hello there", "what is it", "and then what"):
        messages.append({"role": "user", "content": text})
        ids = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"]])
        expected = model.generate(ids, cache=DynamicCache, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert talk.say(text) == tokenizer.decode(expected)
        messages.append({"role": "assistant", "content": tokenizer.decode(expected)})
        assert talk.cache.get_seq_length() == ids.shape[1] + 11 == len(talk.held)
    assert f"{talk.cache.get_seq_length():,} tokens in {talk.cache.nbytes:,} bytes" in talk.status()


def test_a_conversation_too_long_for_the_model_is_refused_and_unchanged():
    model = make_model(max_position_embeddings=64)
    talk = Conversation(model, Letters(), DynamicCache, max_new_tokens=5, do_sample=False)
    talk.say("short")
    held, messages = list(talk.held), list(talk.messages)
    with pytest.raises(ValueError, match=r"The conversation has .* tokens, the model's context 64"):
        talk.say("x" * 80)
    assert talk.held == held and talk.messages == messages


@pytest.mark.parametrize("make_cache", [CSKVCache, DynamicCache])
def test_an_interrupted_turn_is_as_if_it_had_not_been(make_cache):
    model = lossless(make_model())
    talk = Conversation(model, Letters(), make_cache, max_new_tokens=12, do_sample=False)
    other = Conversation(model, Letters(), make_cache, max_new_tokens=12, do_sample=False)
    assert talk.say("hello there") == other.say("hello there")

    class Stop(StatusStreamer):
        def put(self, value):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("not this", Stop(talk, show=False))
    assert len(talk.messages) == 2
    assert talk.say("but this") == other.say("but this")


def test_an_answer_ends_where_the_context_does():
    model = make_model(max_position_embeddings=64)
    talk = Conversation(model, Letters(), DynamicCache, max_new_tokens=500, do_sample=False)
    talk.say("hello there")
    assert talk.cache.get_seq_length() == 63  # the last token was not read


def test_a_pad_token_within_the_text_is_read():
    """The mask is given: were it inferred from the pad token, that token would be hidden."""
    model = lossless(make_model())
    model.generation_config.pad_token_id = Letters.pad_token_id = Letters()("a")["input_ids"][0]
    talk = Conversation(model, Letters(), CSKVCache, max_new_tokens=8, do_sample=False)
    ids = torch.tensor([talk._render([{"role": "user", "content": "banana"}])])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert talk.say("banana") == Letters().decode(expected[0, ids.shape[1] :])
    Letters.pad_token_id = 0


def test_the_title_shows_the_cache_as_it_grows(capsys):
    model = lossless(make_model())
    talk = Conversation(model, Letters(), CSKVCache, max_new_tokens=6, do_sample=False)
    talk.say("hello", StatusStreamer(talk, show=True))
    assert capsys.readouterr().out.count("\033]0;cache: ") >= 6
