"""LoRA and CSKV on one model: train a LoRA, then fit CSKV on the model with it: python examples/stack_with_lora.py

Fit CSKV last, so that its factors match the keys and values that the LoRA makes. The LoRA stays as it is and can be
switched off or merged. If you switch it off, the CSKV factors no longer match the model, so fit an adapter for each
case.
"""

import torch
from common import arguments, calibration_texts, fit, load_model, passage
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from cskv_hf.samples import cut


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of LoRA training")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)

    model.add_adapter(LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), adapter_name="style")
    ids = torch.tensor([i for text in calibration_texts()[:40] for i in tokenizer(text)["input_ids"]])
    rows = [{"input_ids": row, "labels": row} for row in cut(ids, 256, tokenizer) if len(row) == 256]
    training = TrainingArguments(
        "lora-run", max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no",
        report_to="none", logging_steps=10,
    )  # fmt: skip
    Trainer(model, training, train_dataset=rows).train()

    model.eval()
    model = fit(model, tokenizer, args.compression, adapter_name="memory")
    model.set_adapter(["style", "memory"])
    inputs = tokenizer(passage(), return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :]))
    print(output.past_key_values.report())


if __name__ == "__main__":
    main()
