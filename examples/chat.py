"""Several turns with one cache, which holds the whole conversation: python examples/chat.py

Without --interactive it plays three turns by itself. The bundled model was not trained to chat, so its answers make
little sense. After every turn it prints what the cache holds and what a full one would hold.
"""

import sys

from common import arguments, fit, load_model
from transformers import TextStreamer

from cskv_hf import CSKVCache
from cskv_hf.chat import Conversation

TURNS = ("What does the import statement do?", "How are names bound in a class?", "Explain the yield expression.")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--interactive", action="store_true", help="read turns from the terminal; an empty line ends")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = fit(model, tokenizer, args.compression)
    # generate() may be given the same cache turn by turn; a Conversation also cuts it back to where a chat template
    # renders earlier turns otherwise than the model wrote them
    talk = Conversation(model, tokenizer, CSKVCache, max_new_tokens=args.max_new_tokens, do_sample=False)
    for turn in iter(lambda: input("> "), "") if args.interactive else TURNS:
        if not args.interactive:
            print(f"> {turn}")
        talk.say(turn, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        print(f"[{talk.status()}]\n", file=sys.stderr if args.interactive else sys.stdout)


if __name__ == "__main__":
    main()
