"""The oracle: CSKV generation from its definition, one row, one token and one head at a time, nothing shared with
the package's code.

Every token's exact key (before RoPE) and value are kept for ever; what a query sees of an old token is
``RoPE(B A (k - μ) + μ)`` and ``B A (v - μ) + μ`` (CSKV section 2.1, about the means μ of the adapter), with the
latents of each block quantised first if the adapter packs them. Works in the model's dtype; use float64.
"""

import torch


def rope(x, position, inv_freq, scaling):
    """Rotate one vector (head_dim,) to `position`: channel f and f + head_dim/2 are a pair."""
    half = x.shape[0] // 2
    angle = torch.tensor(float(position), dtype=torch.float32) * inv_freq.float()
    cos, sin = (angle.cos() * scaling).to(x.dtype), (angle.sin() * scaling).to(x.dtype)
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


class Reference:
    """One sequence through `model` with the factors of its CSKV adapter.

    Args:
        window, sinks, block: in tokens.
    """

    def __init__(self, model, adapter, window, sinks, block):
        self.model = model
        self.decoder = model.get_decoder()
        self.window, self.sinks, self.block = window, sinks, block
        self.scaling = self.decoder.rotary_emb.attention_scaling
        self.inv_freqs = []  # of every token; dynamic and longrope turn each by what held when it came
        self.factors = []  # per layer, keys and values: A, B and mean over all heads; how they are packed
        for index, layer in enumerate(self.decoder.layers):
            cskv = layer.self_attn.cskv
            A, B = cskv.cskv_key_A[adapter].weight, cskv.cskv_key_B[adapter].weight
            parts, start = [], 0
            for rank in cskv.key_ranks[adapter]:
                parts.append((A[start : start + rank], B[:, start : start + rank]))
                start += rank
            keys = torch.block_diag(*(a for a, _ in parts)), torch.block_diag(*(b for _, b in parts))
            values = cskv.cskv_value_A[adapter].weight, cskv.cskv_value_B[adapter].weight
            keys = *keys, cskv.cskv_key_mean[adapter].weight[0]
            values = *values, cskv.cskv_value_mean[adapter].weight[0]
            layouts = [getattr(f, "layout", None) for f in cskv.configs[adapter].formats(index)]
            self.factors.append((*zip((keys, values), layouts),))
        self.seen_old = [[[], []] for _ in self.decoder.layers]  # per layer: keys and values of old tokens as seen
        self.keys = [[] for _ in self.decoder.layers]
        self.values = [[] for _ in self.decoder.layers]
        self.num_tokens = 0
        self.num_old = 0

    @torch.no_grad()
    def forward(self, ids):
        """Logits (tokens, vocab) of the next tokens, given in one forward (a prompt, a turn, or one token)."""
        hidden = self.decoder.embed_tokens(ids)
        start = self.num_tokens
        self.decoder.rotary_emb(hidden[None], torch.arange(start, start + len(ids))[None])  # updates its frequencies
        self.inv_freqs += [self.decoder.rotary_emb.inv_freq.clone() for _ in ids]
        for index, layer in enumerate(self.decoder.layers):
            x = layer.input_layernorm(hidden)
            attended = torch.stack([self.attend(index, layer.self_attn, x, t, start) for t in range(len(ids))])
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.num_tokens += len(ids)
        while self.num_tokens - self.sinks - self.num_old - self.window >= self.block:
            self.compress_block()
        return self.model.lm_head(self.decoder.norm(hidden))

    def compress_block(self):
        first = self.sinks + self.num_old
        for index, sides in enumerate(self.factors):
            for exact, seen, ((A, B, mean), layout) in zip((self.keys, self.values), self.seen_old[index], sides):
                latents = torch.stack([A @ (state - mean) for state in exact[index][first : first + self.block]])
                if layout is not None:
                    latents = quantised_by_definition(latents[None], layout)[0]
                seen.extend(B @ c + mean for c in latents)
        self.num_old += self.block

    def attend(self, index, attn, x, t, start):
        head_dim, groups = attn.head_dim, attn.num_key_value_groups
        if t == 0:  # the keys and values of all new tokens
            for state in x:
                k = attn.k_proj(state).view(-1, head_dim)
                self.keys[index].append((attn.k_norm(k) if hasattr(attn, "k_norm") else k).flatten())
                self.values[index].append(attn.v_proj(state))
        q = attn.q_proj(x[t]).view(-1, head_dim)
        q = attn.q_norm(q) if hasattr(attn, "q_norm") else q
        position = start + t
        sliding = getattr(attn, "sliding_window", None) or getattr(attn.config, "sliding_window", None)
        if getattr(attn, "layer_type", None) == "full_attention":
            sliding = None
        heads = []
        for head in range(q.shape[0]):
            channels = slice(head // groups * head_dim, (head // groups + 1) * head_dim)
            query = rope(q[head], position, self.inv_freqs[position], self.scaling)
            scores, values = [], []
            for s in range(position + 1):
                if sliding is not None and s <= position - sliding:
                    continue
                k, v = self.keys[index][s], self.values[index][s]
                if self.sinks <= s < self.sinks + self.num_old:
                    k, v = (seen[s - self.sinks] for seen in self.seen_old[index])
                scores.append(query @ rope(k[channels], s, self.inv_freqs[s], self.scaling) * attn.scaling)
                values.append(v[channels])
            heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
        return torch.cat(heads)


def quantised_by_definition(latents, layout):
    """The definition, one group at a time: minimum and step of the group, each value to the nearest level."""
    out = torch.empty_like(latents)
    for tier_bits in set(layout.bits):
        channels = [i for i, b in enumerate(layout.bits) if b == tier_bits]
        for first in range(0, len(channels), layout.group_channels):
            group = channels[first : first + layout.group_channels]
            for row in range(latents.shape[0]):
                for start in range(0, latents.shape[1], layout.group_tokens):
                    values = latents[row, start : start + layout.group_tokens][:, group]
                    minimum = values.min().to(torch.float16)
                    if minimum > values.min():
                        minimum = torch.nextafter(minimum, torch.tensor(-torch.inf, dtype=torch.float16))
                    exact = (values.max() - minimum.double()) / (2**tier_bits - 1)
                    step = exact.to(torch.float16)
                    if step < exact:
                        step = torch.nextafter(step, torch.tensor(torch.inf, dtype=torch.float16))
                    level = ((values - minimum.double()) / step.double()).round() if step > 0 else 0 * values
                    out[row, start : start + layout.group_tokens][:, group] = minimum.double() + step.double() * level
    return out
