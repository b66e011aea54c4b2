"""Fit an adapter, measure it on held-out text, save it, push it with a card: python examples/fit_and_push.py

python examples/fit_and_push.py meta-llama/Llama-3.1-8B --push me/llama-3.1-8b-cskv-80
"""

from pathlib import Path

import torch
from common import arguments, fit, load_model

from cskv_hf.demo.corpus import reference_topics
from cskv_hf.evaluate.divergence import evaluation_record
from cskv_hf.fit_report import format_evaluation, format_report
from cskv_hf.samples import cut


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("my-cskv-adapter"), help="directory for the adapter")
    parser.add_argument("--push", metavar="REPO_ID", help="user/name on the Hub")
    parser.add_argument("--base-model", help="Hub id of the model, if it was given as a directory")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = fit(model, tokenizer, args.compression)
    config = model.peft_config["default"]

    ids = torch.tensor([i for text in reference_topics(held_out=True) for i in tokenizer(text)["input_ids"]])
    rows = torch.stack([row for row in cut(ids, 512, tokenizer) if len(row) == 512][:16])
    config.fit_report["evaluation"] = evaluation_record(model, rows, "Python's language reference, held out")

    print(format_report(config))
    print(format_evaluation(config.fit_report["evaluation"]))
    model.save_pretrained(args.out)
    print(f"saved in {args.out}")
    if args.push:
        print(f"pushed: {model.push_to_hub(args.push, base_model=args.base_model).commit_url}")


if __name__ == "__main__":
    main()
