"""Read a long document once, ask about it many times: python examples/long_document.py

The document is read by the model once; every question continues from a copy of its compressed cache. The bundled
model was trained on records of lines, so by default the document is such a record, the questions ask for its lines,
and other records are used for calibration. For another model give --document and --question, and calibrate on text
like your document (`calibration_texts` of common.py).
"""

import copy
import random
from pathlib import Path

import torch
from common import arguments, fit, load_model

import cskv_hf
from cskv_hf import CSKVCache
from cskv_hf.demo import run as demo
from cskv_hf.evaluate.lines import line_record


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--document", type=Path, help="a text file")
    parser.add_argument("--question", action="append", help="may be given several times")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    if args.document:
        model = fit(model, tokenizer, args.compression)
        document, questions = args.document.read_text(), args.question or ["\nWhat is this about?\n"]
    else:
        config = cskv_hf.CSKVConfig(compression=args.compression)
        model = cskv_hf.fit(model, demo.calibration_data(tokenizer), config)
        record = line_record(100, 5, random.Random(0))
        document, questions = record.text, [record.question(i) for i in range(5)]
    ids = tokenizer(document, return_tensors="pt").input_ids.to(model.device)
    read = CSKVCache()
    with torch.no_grad():
        model(ids, past_key_values=read, use_cache=True, logits_to_keep=1)
    print(f"read {ids.shape[1]:,} tokens\n{read.report()}\n")
    for question in questions:
        asked = torch.cat(
            [ids, tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(ids)], 1
        )
        output = model.generate(asked, past_key_values=copy.deepcopy(read), max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, asked.shape[1] :]).split("\n")[0]
        print(f"{question.strip()}\n  {answer}")


if __name__ == "__main__":
    main()
