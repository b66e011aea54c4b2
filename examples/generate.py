"""Fit, generate with the full and with the compressed cache, and show what each holds: python examples/generate.py"""

from common import arguments, fit, load_model, passage
from transformers import DynamicCache

from cskv_hf import CSKVCache


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt", help="text to go on from; a page of the calibration text by default")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = fit(model, tokenizer, args.compression)
    inputs = tokenizer(args.prompt or passage(), return_tensors="pt").to(model.device)
    for name, cache in (("full cache", DynamicCache()), ("compressed", CSKVCache())):
        output = model.generate(**inputs, cache=cache, max_new_tokens=60, do_sample=False)
        print(f"--- {name}\n{tokenizer.decode(output[0, inputs['input_ids'].shape[1] :])}\n")
    print(cache.report())


if __name__ == "__main__":
    main()
