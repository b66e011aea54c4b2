"""How long a fit computes per layer of an 8B-shaped model, the pass over the data aside: python benchmarks/fit.py

One attention layer of Llama-3.1-8B's sizes (hidden 4096, 32 query heads, 8 KV heads x 128) with random weights and
moments, through the functions that `fit` calls: error weights, factors of keys and values, and the layer's report; the
allocation of bits to all channels of 32 such layers at 95 %; and with ``--probe LAYERS`` the probing of the
sensitivity over the tokens that 32 layers read, on a model of so many layers of Mistral-7B's sizes that share one
layer's weights. The pass over the data is one forward of the model and not part of this.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from cskv_hf import CSKVConfig, KVStatistics, ModelShape
from cskv_hf.calibration import collect_statistics
from cskv_hf.config import num_key_groups
from cskv_hf.fitting import layer_bases, layer_report
from cskv_hf.plan import LayerSpectra, plan
from cskv_hf.sensitivity import measure_sensitivity, probe_samples
from cskv_hf.statistics import PROBE_LENGTH, PROBE_TOKENS

SIZES = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
TOKENS = 8192


def moment(size: int) -> torch.Tensor:
    x = torch.randn(TOKENS, size) * torch.logspace(0, -3, size)
    return (x.mT @ x).double()


def statistics_of_one_layer(shape: ModelShape, hidden_size: int) -> KVStatistics:
    statistics = KVStatistics.empty(shape, hidden_size)
    statistics.num_tokens = TOKENS
    statistics.key_moment[0], statistics.value_moment[0] = moment(shape.kv_dim), moment(shape.kv_dim)
    statistics.read_key_moment[0], statistics.read_value_moment[0] = (moment(shape.kv_dim + 1) for _ in range(2))
    statistics.read_head_key_moment[0] = torch.stack([moment(shape.head_dim + 1)] * shape.num_key_value_heads)
    statistics.read_squares[0] = statistics.read_value_moment[0, -1, -1] / 10
    for of_queries in (statistics.query_moment, statistics.read_query_moment):
        of_queries[0] = torch.stack([moment(shape.head_dim) for _ in range(shape.num_key_value_heads)])
    return statistics


def fit_layer(attention: LlamaAttention, statistics: KVStatistics, key_layout: str) -> float:
    """Seconds for one layer."""
    shape = ModelShape(**statistics.model_shape)
    config = CSKVConfig(compression=0.8, key_layout=key_layout, bits=16, allocation="uniform")
    ((key_rank, value_rank),) = config.layer_ranks(shape)
    started = time.perf_counter()
    keys, values = layer_bases(attention, statistics, 0, config, num_key_groups(key_layout, shape.num_key_value_heads))
    groups = len(keys.ranks)
    keys, values = keys.cut([key_rank // groups] * groups), values.cut([value_rank])
    config.key_ranks, config.value_ranks = [list(keys.ranks)], list(values.ranks)
    layer_report(attention, statistics, 0, config, keys, values)
    return time.perf_counter() - started


def allocate_model(key_layout: str) -> float:
    """Seconds to plan a model of 32 layers; the same plan twice."""
    shape = ModelShape("llama", 32, SIZES["num_key_value_heads"], SIZES["head_dim"])
    groups = num_key_groups(key_layout, shape.num_key_value_heads)
    config = CSKVConfig(compression=0.95, key_layout=key_layout)
    config.sensitivity = torch.rand(32, 2).tolist()

    def spectrum(channels: int) -> torch.Tensor:
        return torch.rand(channels).double().pow(6).sort(descending=True)[0]

    spectra = [
        LayerSpectra([spectrum(shape.kv_dim // groups) for _ in range(groups)], *[spectrum(shape.kv_dim)] * 2)
        for _ in range(32)
    ]
    started = time.perf_counter()
    planned = plan(config, shape, spectra)
    seconds = time.perf_counter() - started
    assert plan(config, shape, spectra) == planned
    return seconds


def deep_model(num_layers: int) -> LlamaForCausalLM:
    """A model of Mistral-7B's sizes and so many layers, which compute as many would and hold the weights of one."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": num_layers}, intermediate_size=14336, vocab_size=32000)
    config.num_hidden_layers = 1
    model = LlamaForCausalLM(config).eval()
    first = model.model.layers[0]
    config.num_hidden_layers = num_layers
    for index in range(1, num_layers):
        with torch.device("meta"):
            layer = type(first)(config, index)
        layer.load_state_dict(first.state_dict(), assign=True)
        model.model.layers.append(layer.eval())
    return model


def probe_model(num_layers: int) -> dict[str, float]:
    """Seconds of the probing, of one forward, and what they come to for 32 layers: L + L (L + 1) runs of a layer."""
    model, kept = deep_model(num_layers), torch.randint(32000, (PROBE_TOKENS,)).split(PROBE_LENGTH)
    samples = probe_samples(kept, 32)
    statistics = collect_statistics(model, kept, progress=False)
    attention = model.model.layers[0].self_attn
    bases = [layer_bases(attention, statistics, i, CSKVConfig(), 8) for i in range(num_layers)]
    started = time.perf_counter()
    measure_sensitivity(model, bases, kept if num_layers >= 16 else samples, progress=False)  # few layers read all
    probing = time.perf_counter() - started
    started = time.perf_counter()
    with torch.no_grad():
        for ids in samples:
            model.lm_head(model.model.embed_tokens(ids)).log_softmax(-1)
    head = time.perf_counter() - started
    layer = (probing - (1 + 2 * num_layers) * head) / (num_layers + num_layers * (num_layers + 1))
    return {
        "layers": num_layers, "tokens": sum(map(len, samples)), "probing": probing, "head": head, "layer": layer,
        "of_32_layers": (32 + 32 * 33) * layer + 65 * head,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", type=int, default=0, metavar="LAYERS", help="also probe a model of so many layers")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model_config = LlamaConfig(**SIZES)
    attention = LlamaAttention(model_config, layer_idx=0)
    statistics = statistics_of_one_layer(ModelShape.from_model_config(model_config), model_config.hidden_size)
    results = {}
    print(f"{'key layout':<12}{'median s':>10}{'max s':>8}   one layer, K and V, {args.threads} threads")
    for layout in ("head", "group:2", "joint"):
        times = sorted(fit_layer(attention, statistics, layout) for _ in range(args.repeats))
        results[layout] = times
        print(f"{layout:<12}{times[len(times) // 2]:>10.2f}{times[-1]:>8.2f}")
    allocation = {layout: allocate_model(layout) for layout in results}
    for layout, seconds in allocation.items():
        print(f"{layout:<12}{seconds:>10.2f}           allocation, 32 layers")
    probe = None
    if args.probe:
        probe = probe_model(args.probe)
        print(
            f"probing     {probe['probing']:>10.0f}           {args.probe} layers, {probe['tokens']} tokens; a layer "
            f"{probe['layer']:.1f}, the head {probe['head']:.1f}\n"
            f"            {probe['of_32_layers'] / 60:>10.0f} min       32 layers, by these"
        )
    if args.out:
        machine = {"cpu": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        args.out.write_text(
            json.dumps({"machine": machine, "seconds": results, "allocation": allocation, "probe": probe}, indent=1)
        )


if __name__ == "__main__":
    main()
