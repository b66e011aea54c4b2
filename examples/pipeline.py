"""An adapter in a pipeline: the adapter's name is all that the pipeline needs.

python examples/pipeline.py, or python examples/pipeline.py MODEL --adapter user/adapter
"""

import tempfile

import transformers
from common import arguments, fit, load_model, passage

import cskv_hf  # noqa: F401  (registers the adapter type)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--adapter", help="directory or Hub id; without it one is fitted first")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapter = args.adapter
        if adapter is None:
            model, tokenizer = load_model(args.model)
            fit(model, tokenizer, args.compression).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            adapter = folder
        generate = transformers.pipeline("text-generation", model=adapter)
        prompts = [passage(length) for length in (1000, 2000)]
        options = dict(max_new_tokens=40, do_sample=False, return_full_text=False)
        for prompt, answer in zip(prompts, generate(prompts, **options)):
            print(f"... {prompt[-80:]!r}\n    {answer[0]['generated_text']!r}\n")


if __name__ == "__main__":
    main()
