"""The oracle: CSKV generation from its definition, one row, one token and one head at a time, nothing shared with
the package's code.

Every token's exact key (before RoPE) and value are kept for ever; what a query sees of an old token is computed anew
each time as ``RoPE(B A k)`` and ``B A v`` (CSKV section 2.1). Works in the model's dtype; use float64.
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
        self.inv_freq = self.decoder.rotary_emb.inv_freq
        self.scaling = self.decoder.rotary_emb.attention_scaling
        self.maps = []  # per layer: (kv_dim, kv_dim) matrices k -> B A k and v -> B A v
        for layer in self.decoder.layers:
            cskv = layer.self_attn.cskv
            blocks, start = [], 0
            A, B = cskv.cskv_key_A[adapter].weight, cskv.cskv_key_B[adapter].weight
            for rank in cskv.key_ranks[adapter]:
                blocks.append(B[:, start : start + rank] @ A[start : start + rank])
                start += rank
            self.maps.append(
                (torch.block_diag(*blocks), cskv.cskv_value_B[adapter].weight @ cskv.cskv_value_A[adapter].weight)
            )
        self.keys = [[] for _ in self.decoder.layers]
        self.values = [[] for _ in self.decoder.layers]
        self.num_tokens = 0
        self.num_old = 0

    @torch.no_grad()
    def forward(self, ids):
        """Logits (tokens, vocab) of the next tokens, given in one forward (a prompt, a turn, or one token)."""
        hidden = self.decoder.embed_tokens(ids)
        start = self.num_tokens
        for index, layer in enumerate(self.decoder.layers):
            x = layer.input_layernorm(hidden)
            attended = torch.stack([self.attend(index, layer.self_attn, x, t, start) for t in range(len(ids))])
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.num_tokens += len(ids)
        surplus = self.num_tokens - self.sinks - self.num_old - self.window
        if surplus >= self.block:
            self.num_old += surplus // self.block * self.block
        return self.model.lm_head(self.decoder.norm(hidden))

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
            query = rope(q[head], position, self.inv_freq, self.scaling)
            scores, values = [], []
            for s in range(position + 1):
                if sliding is not None and s <= position - sliding:
                    continue
                k, v = self.keys[index][s], self.values[index][s]
                if self.sinks <= s < self.sinks + self.num_old:
                    key_map, value_map = self.maps[index]
                    k, v = key_map @ k, value_map @ v
                scores.append(query @ rope(k[channels], s, self.inv_freq, self.scaling) * attn.scaling)
                values.append(v[channels])
            heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
        return torch.cat(heads)
