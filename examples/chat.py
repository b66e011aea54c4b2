"""Several turns with one cache, which holds the whole conversation: python examples/chat.py

Without --interactive it plays three turns by itself (the bundled model knows no chat, so what it says makes little
sense). After every turn it prints what the cache holds and what a full
one would.
"""

import sys

from common import arguments, fit, load_model
from transformers import TextStreamer

from cskv_hf import CSKVCache

TURNS = ("What does the import statement do?", "How are names bound in a class?", "Explain the yield expression.")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--interactive", action="store_true", help="read turns from the terminal; an empty line ends")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = fit(model, tokenizer, args.compression)
    cache, messages, history = CSKVCache(), [], ""
    config = model.config
    full_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    for turn in iter(lambda: input("> "), "") if args.interactive else TURNS:
        if not args.interactive:
            print(f"> {turn}")
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": turn})
            history = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:  # a base model goes on with the text
            history += turn + "\n"
        inputs = tokenizer(history, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        output = model.generate(
            **inputs.to(model.device), past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        history += answer + "\n"
        tokens = cache.get_seq_length()
        print(
            f"[{tokens:,} tokens in {cache.nbytes:,} bytes, {100 * cache.nbytes / (tokens * full_bytes):.0f} % of a "
            "full cache]\n",
            file=sys.stderr if args.interactive else sys.stdout,
        )


if __name__ == "__main__":
    main()
