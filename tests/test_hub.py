"""Adapters over real HTTP: pushed with a card, pulled through every entry point, and refused where they must be.

One base model and one adapter are pushed to a Hub on localhost (local_hub.py) and generate the same tokens however
they come back.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import HUB, OWNER, STRANGER, calibration_data, lossy, make_model, prompt
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.evaluate.divergence import evaluation_record
from cskv_hf.pushing import push_folder
from cskv_hf.quantize import channel_bits

GREEDY = dict(max_new_tokens=16, do_sample=False)
PACKED = dict(compression=0.75, bits=None, allocation=None, block_size=8)
TABLE, WAYS_OUT = "entry-points", "ways-out"
BASE, ADAPTER = "ada/tiny-llama", "ada/tiny-llama-cskv"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tiny_model():
    return make_model(dtype=torch.float32, hidden_size=64)


def tiny_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, 89)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Base and adapter on the Hub; the tokens that the pair generates, and the adapter's directory."""
    folder = tmp_path_factory.mktemp("hub")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: llama3.1\n---\n# Tiny\n")
    api = HfApi()
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=folder / "base")
    base = AutoModelForCausalLM.from_pretrained(BASE).eval()
    model = lossy(base, **PACKED)
    config = model.peft_config["default"]
    config.fit_report["evaluation"] = evaluation_record(model, prompt(3, 100), "random tokens")
    tokens = model.generate(prompt(1, 60), **GREEDY)
    model.save_pretrained(folder / "adapter")
    commit = model.push_to_hub(ADAPTER, tags=["tiny"])
    assert commit.oid == HUB.repos[ADAPTER].refs["main"]
    return tokens, folder / "adapter"


def entry_points(adapter):
    """Every way to get a model with the adapter, by name."""

    def base(**kwargs):
        return AutoModelForCausalLM.from_pretrained(BASE, **kwargs).eval()

    def with_load_adapter():
        model = base()
        model.load_adapter(adapter)
        return model

    def from_pipeline(**kwargs):
        return pipeline("text-generation", model=adapter, **kwargs).model

    return {
        "cskv_hf.load": lambda: cskv_hf.load(base(), adapter),
        "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(base(), adapter),
        "PeftModel.from_pretrained(adapter_name)": lambda: PeftModel.from_pretrained(
            base(), adapter, adapter_name="memory"
        ),
        "PeftModel.from_pretrained(low_cpu_mem_usage)": lambda: PeftModel.from_pretrained(
            base(), adapter, low_cpu_mem_usage=True
        ),
        "AutoPeftModelForCausalLM.from_pretrained": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
        "AutoModelForCausalLM.from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(adapter),
        "AutoModelForCausalLM.from_pretrained(device_map)": lambda: AutoModelForCausalLM.from_pretrained(
            adapter, device_map="cpu"
        ),
        "AutoModelForCausalLM.from_pretrained(dtype)": lambda: AutoModelForCausalLM.from_pretrained(
            adapter, dtype=torch.float32
        ),
        "model.load_adapter": with_load_adapter,
        "pipeline(model=adapter)": from_pipeline,
        "pipeline(model=adapter, device_map)": lambda: from_pipeline(device_map="cpu"),
    }


@pytest.mark.parametrize("where", ["Hub", "directory"])
@pytest.mark.parametrize("name", list(entry_points("")))
def test_the_same_tokens_through_every_entry_point(pushed, name, where, documented):
    documented(TABLE, f"`{name}`", where)
    tokens, folder = pushed
    model = entry_points(ADAPTER if where == "Hub" else str(folder))[name]()
    output = model.generate(prompt(1, 60), return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.past_key_values, CSKVCache) and output.past_key_values.tokens.num_old > 0
    assert torch.equal(output.sequences, tokens)


def test_files_of_a_push(pushed, documented):
    """Config, weights, card and nothing else; no path of this machine; the card's numbers are the config's."""
    documented(WAYS_OUT, "`model.push_to_hub(tags)`, on a model of `fit` or `load`", "result")
    documented(WAYS_OUT, "`model.save_pretrained`", "result")
    assert HUB.paths(ADAPTER) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = ModelCard.load(ADAPTER)
    assert card.data.base_model == BASE and card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.license == "llama3.1"  # the base model's
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"cskv", "kv-cache-compression", f"base_model:adapter:{BASE}", "tiny"} <= set(card.data.tags)
    config = CSKVConfig.from_pretrained(ADAPTER)
    evaluation = config.fit_report["evaluation"]
    for piece in (
        "import cskv_hf",
        f'from_pretrained("{ADAPTER}"',
        f"{config.bytes_per_token(AutoModelForCausalLM.from_pretrained(BASE).config):,.1f} of 256",
        f"Fitted on {config.fit_report['num_tokens']:,} tokens",
        f"{evaluation['ratio']:.4f} (no interval: few rows)",
        "on 108 tokens (random tokens)",
    ):
        assert piece in card.text, piece
    everything = "".join(HUB.file(ADAPTER, path).decode("latin-1") for path in HUB.paths(ADAPTER))
    for secret in (OWNER, str(pushed[1].parent), os.path.expanduser("~") + "/", "/tmp/"):
        assert secret not in everything


def test_an_identical_push_makes_no_commit(pushed, documented):
    documented(WAYS_OUT, "the same again", "result", "no commit")
    before = dict(HUB.repos[ADAPTER].refs)
    commit = push_folder(pushed[1], ADAPTER, tags=["tiny"])
    assert HUB.repos[ADAPTER].refs == before and commit.oid == before["main"]


def test_branch_pull_request_private_and_strangers(pushed, documented):
    """revision, create_pr and private do what they say; what is private stays so."""
    documented(WAYS_OUT, "`push_to_hub(revision)`, `(create_pr)`, `(private)`, `(token)`, `(license)`", "result")
    folder, repo = pushed[1], "ada/private-cskv"
    push_folder(folder, repo, private=True, commit_message="first")
    assert HUB.repos[repo].private
    main = HUB.repos[repo].refs["main"]
    push_folder(folder, repo, revision="strong", tags=["branch"], license="mit")
    assert HUB.repos[repo].refs["main"] == main != HUB.repos[repo].refs["strong"]
    commit = push_folder(folder, repo, create_pr=True, tags=["pr"])
    assert commit.pr_revision == "refs/pr/1" and HUB.repos[repo].refs["main"] == main
    assert "pr" in ModelCard.load(hf_hub_download(repo, "README.md", revision="refs/pr/1")).data.tags
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        cskv_hf.load(make_model(), repo, token=STRANGER)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        cskv_hf.load(make_model(), repo, token=False)
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(folder, ADAPTER, token=STRANGER, tags=["mine"])
    with pytest.raises(HfHubHTTPError, match="401"):
        push_folder(folder, repo, token="hf_unknown")
    commit = push_folder(folder, ADAPTER, token=STRANGER, create_pr=True, tags=["suggestion"])
    assert commit.pr_num == 1  # a stranger may propose
    assert cskv_hf.load(tiny_model(), repo, token=OWNER, revision="strong") is not None


def test_a_revision_is_that_revision(pushed, documented):
    """Two adapters on two branches of one repository."""
    documented(TABLE, "`cskv_hf.load(revision, token)`", "Hub")
    documented(TABLE, '`AutoModelForCausalLM.from_pretrained(adapter_kwargs={"revision": ...})`', "Hub")
    other = lossy(tiny_model(), **PACKED | {"compression": 0.6})
    other.push_to_hub(ADAPTER, base_model=BASE, revision="r60")
    for revision, compression in (("main", 0.75), ("r60", 0.6)):
        model = cskv_hf.load(tiny_model(), ADAPTER, revision=revision)
        assert model.peft_config["default"].compression == compression
        model = AutoModelForCausalLM.from_pretrained(ADAPTER, adapter_kwargs={"revision": revision})
        assert model.peft_config["default"].compression == compression
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        cskv_hf.load(make_model(), ADAPTER, revision="r99")


def test_subfolder_and_smaller_rank(pushed, documented):
    documented(TABLE, "`cskv_hf.load(subfolder)`", "Hub")
    documented(TABLE, "`cskv_hf.load(compression)`, a smaller rank", "Hub")
    HfApi().create_repo("ada/many", exist_ok=True)
    HfApi().upload_folder(repo_id="ada/many", folder_path=pushed[1], path_in_repo="llama/75")
    model = cskv_hf.load(tiny_model(), "ada/many", subfolder="llama/75")
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), pushed[0])
    model = cskv_hf.load(tiny_model(), ADAPTER, compression=0.9)
    assert model.peft_config["default"].bytes_per_token(model.config) <= 0.1 * 256
    model.push_to_hub("ada/cut", base_model=BASE)
    card = ModelCard.load("ada/cut").text
    config = CSKVConfig.from_pretrained("ada/cut")
    assert f"{config.bytes_per_token(model.config):,.1f} of 256" in card and "No evaluation was recorded." in card
    assert "Energy lost" not in card and "was not measured after it was cut or trained" in card
    with pytest.raises(ValueError, match=r"'ada/many', folder 'llama' is not a complete CSKV adapter"):
        cskv_hf.load(make_model(), "ada/many", subfolder="llama")


def test_pipeline_drop_in(pushed, documented):
    """Strings, chats, batches with padding and streaming, through a pipeline that was told the adapter's name only."""
    documented(TABLE, "pipeline: strings, chats, batches, streaming", "Hub")
    generate = pipeline("text-generation", model=ADAPTER)
    greedy = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
    short, long = "w7 w8 w9", " ".join(f"w{2 + i * 7 % 80}" for i in range(50))
    alone = [generate(text, **greedy)[0]["generated_text"] for text in (short, long)]
    together = generate([short, long], batch_size=2, **greedy)
    assert [answer[0]["generated_text"] for answer in together] == alone
    chat = [{"role": "w10", "content": long}]
    answer = generate(chat, **greedy)[0]["generated_text"]
    assert len(str(answer).split()) >= 12
    streamer = TextIteratorStreamer(generate.tokenizer, skip_prompt=True)
    generate(long, streamer=streamer, **greedy)
    assert "".join(streamer).split() == alone[1].split()
    manual = AutoModelForCausalLM.from_pretrained(ADAPTER)
    ids = generate.tokenizer(long, return_tensors="pt").input_ids
    output = manual.generate(ids, max_new_tokens=12, do_sample=False)
    assert generate.tokenizer.decode(output[0, ids.shape[1] :]).split() == alone[1].split()


def test_adapters_switched_on_a_transformers_model(pushed, documented):
    documented(TABLE, "`set_adapter`, `disable_adapters`, `delete_adapter`", "Hub")
    model = AutoModelForCausalLM.from_pretrained(ADAPTER)
    full = AutoModelForCausalLM.from_pretrained(BASE).generate(prompt(1, 60), **GREEDY)
    model.load_adapter(ADAPTER, adapter_name="small", adapter_kwargs={"revision": "r60"})
    model.set_adapter("small")
    small = model.generate(prompt(1, 60), **GREEDY)
    model.set_adapter("default")
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), pushed[0])
    model.disable_adapters()
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), full)
    model.enable_adapters()
    model.delete_adapter("default")
    model.set_adapter("small")
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), small)


def test_a_revision_for_both_is_refused_upstream(pushed, documented):
    """transformers asks the base for the adapter's revision too; the way out is documented."""
    row = "`AutoModelForCausalLM.from_pretrained(revision=...)`, `pipeline(revision=...)`"
    documented(TABLE, row, "Hub", "refused: transformers applies it to the base too; use `adapter_kwargs`")
    with pytest.raises(OSError, match="r60"):
        AutoModelForCausalLM.from_pretrained(ADAPTER, revision="r60")
    with pytest.raises(Exception, match="r60"):
        pipeline("text-generation", model=ADAPTER, revision="r60")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_config(pushed, bits, documented):
    documented(TABLE, "`AutoModelForCausalLM.from_pretrained(quantization_config)`, bitsandbytes", "Hub")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(ADAPTER, quantization_config=quantisation)
    output = model.generate(prompt(1, 60), return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.past_key_values, CSKVCache) and output.past_key_values.tokens.num_old > 0


OFFLINE = """
import sys, torch
import cskv_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained(sys.argv[2])
loaded = cskv_hf.load(base, sys.argv[1])
ids = torch.tensor([eval(sys.argv[3])])
for m in (model, loaded):
    print(m.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist())
"""


def test_offline_from_the_cache(pushed, documented):
    """A second process without a Hub, on what the first one downloaded."""
    documented(TABLE, "offline, from the cache (`HF_HUB_OFFLINE`)", "Hub")
    AutoModelForCausalLM.from_pretrained(ADAPTER)
    command = [sys.executable, "-c", OFFLINE, ADAPTER, BASE, str(prompt(1, 60)[0].tolist())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines() == [str(pushed[0][0].tolist())] * 2


def test_interrupted_download_is_taken_up(pushed, tmp_path):
    """The connection breaks in the middle of the weights; the client asks for the rest, and the file is whole."""
    size = len(HUB.file(ADAPTER, "adapter_model.safetensors"))
    HUB.cut_after["adapter_model.safetensors"] = size // 2
    model = cskv_hf.load(tiny_model(), ADAPTER, cache_dir=tmp_path)
    assert not HUB.cut_after
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), pushed[0])


def test_bad_repositories(pushed, tmp_path):
    """What is missing, corrupt, of another kind or of a newer format, each by its name."""
    api, config = HfApi(), (pushed[1] / "adapter_config.json").read_text()
    weights = (pushed[1] / "adapter_model.safetensors").read_bytes()

    def repo(name, **files):
        api.create_repo(f"ada/{name}", exist_ok=True)
        for path, content in files.items():
            path = path.replace("__", ".")
            api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=f"ada/{name}")
        return f"ada/{name}"

    whole = dict(adapter_config__json=config.encode(), adapter_model__safetensors=weights)
    newer = json.loads(config) | {"format_version": 2, "something_new": True}
    lora = json.loads(config) | {"peft_type": "LORA"}
    cases = {
        "no-weights": (
            dict(adapter_config__json=config.encode()),
            "needs adapter_config.json and adapter_model.safet",
        ),
        "no-config": (dict(adapter_model__safetensors=weights), "is not a complete CSKV adapter"),
        "pickle": (
            dict(adapter_config__json=config.encode(), adapter_model__bin=b"\x80\x04."),
            "pickles among them, are not read",
        ),
        "corrupt": (whole | dict(adapter_model__safetensors=weights[:-64]), "is truncated or corrupt"),
        "newer": (
            whole | dict(adapter_config__json=json.dumps(newer).encode()),
            r"`format_version`=2, this cskv-hf reads up to 1.*pip install -U cskv-hf",
        ),
        "lora": (whole | dict(adapter_config__json=json.dumps(lora).encode()), "is a LORA adapter, not a CSKV one"),
    }
    for name, (files, message) in cases.items():
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            cskv_hf.load(model, repo(name, **files))
        assert not hasattr(model.model.layers[0].self_attn, "cskv"), name
    with pytest.raises(RepositoryNotFoundError):
        cskv_hf.load(make_model(), "ada/nothing-here")
    with pytest.raises(ValueError, match="neither a directory nor a Hub id"):
        cskv_hf.load(make_model(), tmp_path / "nowhere" / "at all")
    with pytest.raises(ValueError, match=r"fitted to another model \(num_hidden_layers: adapter 2, model 3\)"):
        cskv_hf.load(make_model(num_hidden_layers=3), ADAPTER)


def test_a_second_adapter_onto_a_peft_model(pushed, tmp_path):
    """It joins the first, by a name of its own, in the same `PeftModel`."""
    lossy(tiny_model(), **PACKED | {"compression": 0.6}).save_pretrained(tmp_path)
    expected = cskv_hf.load(tiny_model(), tmp_path).generate(prompt(1, 60), **GREEDY)
    model = cskv_hf.load(tiny_model(), pushed[1])
    assert cskv_hf.load(model, tmp_path, adapter_name="large") is model
    assert list(model.peft_config) == ["default", "large"] and model.active_adapter == "large"
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), expected)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("default")
    assert torch.equal(model.generate(prompt(1, 60), **GREEDY), pushed[0])
    cskv_hf.load(model, tmp_path, adapter_name="small", compression=0.8)
    assert model.peft_config["small"].compression == 0.8 and model.peft_config["large"].compression == 0.6
    with pytest.raises(ValueError, match=r"'large' is the name of an adapter that this PeftModel has already"):
        cskv_hf.load(model, pushed[1], adapter_name="large")


def test_weights_of_another_adapter(pushed, tmp_path):
    """A config and weights that were not saved together are told from the header, before the model is touched."""
    lossy(tiny_model(), **PACKED | {"compression": 0.6}).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(pushed[1] / weights.name)
    dropped = next(name for name in state if "layers.1" in name and "value_mean" in name)
    part = {name: tensor for name, tensor in load_file(weights).items() if name != dropped}
    for other, message in ((state, r"of layer \d is \(\d+, 8\) in the file, \(\d+, 8\) by the config"),
                           (part, "`cskv_value_mean` of layer 1 is missing in the file")):  # fmt: skip
        save_file(other, weights)
        model = tiny_model()
        with pytest.raises(ValueError, match=rf"does not belong to the adapter_config\.json beside it: .*{message}"):
            cskv_hf.load(model, tmp_path)
        assert not hasattr(model.model.layers[0].self_attn, "cskv") and not hasattr(model, "peft_config")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="names no `peft_type`"):
        cskv_hf.load(model, tmp_path)


def test_cuts_by_one_kind_of_budget(tmp_path):
    """An adapter of explicit ranks is cut to a compression with the same ranks everywhere and stays unpacked; a packed
    one cut to ranks keeps the bits of its channels, so that it never grows. What cannot be cut is left as it is."""
    plain = dict(window=8, sinks=3, block_size=8)
    data = calibration_data(tiny_model())
    ranked = cskv_hf.fit(tiny_model(), data, CSKVConfig(key_rank=12, value_rank=8, **plain), progress=False)
    ranked.save_pretrained(tmp_path / "ranked")
    model = cskv_hf.load(tiny_model(), tmp_path / "ranked", compression=0.8)
    config = model.peft_config["default"]
    assert config.value_ranks == [sum(ranks) for ranks in config.key_ranks] == [5, 5] and config.key_bits is None
    model.save_pretrained(tmp_path / "cut")
    again = cskv_hf.load(tiny_model(), tmp_path / "cut")
    assert torch.equal(again.generate(prompt(1, 60), **GREEDY), model.generate(prompt(1, 60), **GREEDY))
    base = tiny_model()
    with pytest.raises(ValueError, match="Cannot cut factors of rank 12"):
        cskv_hf.load(base, tmp_path / "ranked", compression=0.5)
    assert not hasattr(base.model.layers[0].self_attn, "cskv")

    packed = lossy(tiny_model(), **PACKED)
    config = packed.peft_config["default"]
    before, size = copy.deepcopy(config), config.bytes_per_token(packed.config)
    for wrong in ({}, dict(key_rank=4), dict(compression=0.8, value_rank=4)):
        with pytest.raises(
            ValueError, match="`shrink` takes either `compression`, or `key_rank` and `value_rank`; got"
        ):
            cskv_hf.shrink(packed, **wrong)
    for wrong in (dict(key_ranks=4), dict(window=64), dict(bits=16)):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            cskv_hf.shrink(packed, 0.8, **wrong)
    assert config == before
    ranks = min(map(sum, config.key_ranks)), min(config.value_ranks)
    cskv_hf.shrink(packed, key_rank=ranks[0], value_rank=ranks[1])
    assert config.bytes_per_token(packed.config) <= size
    for layer in range(2):
        held = (
            (config.key_bits[layer], before.key_bits[layer]),
            (config.value_bits[layer:][:1], before.value_bits[layer:][:1]),
        )
        for now, then in held:
            for group, old in zip(now, then):
                bits = channel_bits([group])
                assert bits == channel_bits([old])[: len(bits)]
    packed.save_pretrained(tmp_path / "packed")
    again = cskv_hf.load(tiny_model(), tmp_path / "packed")
    assert torch.equal(again.generate(prompt(1, 60), **GREEDY), packed.generate(prompt(1, 60), **GREEDY))


class Payload:
    """Runs code where it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_run_by_any_loader(pushed, tmp_path):
    """A repository with weights in a pickle only: ours reads no such file, and PEFT and transformers, which would,
    unpickle nothing but tensors."""
    torch.save({"payload": Payload(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_bytes((pushed[1] / "adapter_config.json").read_bytes())
    HfApi().create_repo("ada/evil")
    HfApi().upload_folder(repo_id="ada/evil", folder_path=tmp_path)
    for name, load in entry_points("ada/evil").items():
        with pytest.raises(Exception, match=r"pickles among them|Weights only load failed|weights_only|adapter_model"):
            load()
        assert not (tmp_path / "ran").exists(), name


def test_a_base_of_another_name_is_warned_about(pushed, caplog):
    import logging

    other = tiny_model()
    other.config._name_or_path = "eve/tiny-llama-finetuned"
    logging.getLogger("transformers").propagate = True
    try:
        cskv_hf.load(other, ADAPTER)
    finally:
        logging.getLogger("transformers").propagate = False
    assert f"was fitted to '{BASE}', the model is 'eve/tiny-llama-finetuned'" in caplog.text


def test_a_base_known_by_its_path_must_be_named(pushed, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lossy(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), **PACKED)
    with pytest.raises(ValueError, match=r"not a Hub id.*`base_model='user/model'`"):
        model.push_to_hub("ada/from-a-path")
    assert "ada/from-a-path" not in HUB.repos
    model.push_to_hub("ada/from-a-path", base_model=BASE)
    assert str(tmp_path) not in HUB.file("ada/from-a-path", "adapter_config.json").decode()
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained("ada/from-a-path").generate(prompt(1, 60), **GREEDY),
        model.generate(prompt(1, 60), **GREEDY),
    )


def test_pushes_that_fail_leave_nothing_behind(pushed, tmp_path, monkeypatch):
    """No repository is made for an adapter without factors, or for a pull request against a branch.
    A base that is named is believed, whatever folder has the same name here."""
    get_peft_model(tiny_model(), CSKVConfig(key_rank=8, value_rank=8)).save_pretrained(tmp_path / "unfitted")
    with pytest.raises(ValueError, match="has no factors yet"):
        push_folder(tmp_path / "unfitted", "ada/unfitted", base_model=BASE)
    with pytest.raises(
        ValueError, match="`create_pr` opens a pull request against the main branch, not `revision`='new'"
    ):
        push_folder(pushed[1], "ada/unfitted", create_pr=True, revision="new")
    assert "ada/unfitted" not in HUB.repos
    monkeypatch.chdir(tmp_path)
    (tmp_path / BASE).mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a Hub id"):
        push_folder(pushed[1], "ada/named")  # as it was recorded, it may be that folder
    push_folder(pushed[1], "named", base_model=BASE)
    assert 'from_pretrained("ada/named"' in ModelCard.load("ada/named").text


def test_push_from_a_transformers_model_and_by_adapter_name(pushed, documented):
    """An adapter inside a transformers model, and one of several of a PeftModel."""
    documented(WAYS_OUT, "`cskv_hf.push_to_hub(model)`, on a transformers model with adapters inside", "result")
    documented(WAYS_OUT, "`push_to_hub(adapter_name)`, one of several", "result")
    model = AutoModelForCausalLM.from_pretrained(ADAPTER)
    cskv_hf.push_to_hub(model, "ada/again")
    for path in ("adapter_model.safetensors", "adapter_config.json"):
        assert HUB.file("ada/again", path) == HUB.file(ADAPTER, path)
    model = cskv_hf.load(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)
    settings = CSKVConfig(compression=0.9, window=8, sinks=3, block_size=8)
    model = cskv_hf.fit(model, calibration_data(model), settings, adapter_name="strong", progress=False)
    model.push_to_hub("ada/strong", adapter_name="strong")
    assert HUB.paths("ada/strong") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert CSKVConfig.from_pretrained("ada/strong").compression == 0.9
    with pytest.raises(ValueError, match="has no CSKV adapter 'weak'"):
        model.push_to_hub("ada/weak", adapter_name="weak")


@pytest.mark.parametrize("package", ["transformers", "peft", "huggingface_hub"])
def test_versions_below_the_floor(package, monkeypatch):
    from cskv_hf import _versions

    real = _versions.version
    monkeypatch.setattr(_versions, "version", lambda name: "0.1.0" if name == package else real(name))
    with pytest.raises(ImportError, match=rf"needs {package} .* or newer, found 0\.1\.0.*pip install -U"):
        _versions.check_versions()


def test_without_the_import_peft_says_what_is_missing(pushed):
    """The one thing we cannot word ourselves: upstream's KeyError names CSKV, which troubleshooting.md lists."""
    code = "import sys\nfrom peft import PeftConfig\nPeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, ADAPTER], capture_output=True, text=True, timeout=300)
    assert done.returncode and "CSKV" in done.stderr.splitlines()[-1]
