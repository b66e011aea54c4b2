"""What has turned the keys that are compressed, in the forms that attention wants, each made once for all layers that
turn alike.

What one forward sees, of a growing cache (step.py) and of one of fixed size (static_tokens.py), hands it out.
"""

from __future__ import annotations

import torch

from .rope import RotaryFrequencies, TurnInTiles, cos_sin, widened

TURN_CHUNK = 2**17  # cos that are computed at a time; intermediates are several times the result


class HasOldTurns:
    """What one forward sees, as far as its latents' keys are turned.

    Attributes:
        old_positions: of the latents, (batch, num_old).
        old_frequencies: that turned their keys in the first layer.
        slots: None if the rows of the batch are known to be of one length, without padding.
    """

    old_positions: torch.Tensor
    old_frequencies: RotaryFrequencies
    slots: tuple[torch.Tensor, torch.Tensor] | None
    _turns: dict[str, OldTurns]  # by the kind of layers

    def turns(self, own: RotaryFrequencies) -> OldTurns:
        """Those of the layers that turn new keys by `own`; made once for all of them."""
        if own.kind not in self._turns:
            frequencies = self.old_frequencies.in_layer(own)
            self._turns[own.kind] = OldTurns(self.old_positions, frequencies, uniform=self.slots is None)
        return self._turns[own.kind]


class OldTurns:
    """The turns of the latents' keys in one kind of layers.

    Args:
        positions: (batch, num_old).
        frequencies: that turned them.
        uniform: whether it is worth a look whether rows are alike, and positions follow one another.
    """

    def __init__(self, positions: torch.Tensor, frequencies: RotaryFrequencies, uniform: bool) -> None:
        self.positions, self.frequencies, self.uniform = positions, frequencies, uniform
        self._made: dict = {}  # by what was asked for

    def cos_sin(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the latents' keys, rounded as the model rounds them, in float32 or wider: (batch or 1,
        num_old, head_dim / 2)."""
        key = ("cos_sin", device, dtype)
        if key not in self._made:
            self._made[key] = widened(cos_sin(self._positions_by_row().to(device), self.frequencies, dtype))
        return self._made[key]

    def turn(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[`cos_sin`] as complex numbers, or for a compiler, which knows none, side by side, (batch or 1, num_old,
        head_dim / 2, 2)."""
        key = (device, dtype)
        if key not in self._made:
            compiling = torch.compiler.is_compiling()
            self._made[key] = torch.stack(self.cos_sin(*key), dim=-1) if compiling else self._complex_turn(*key)
        return self._made[key]

    def _complex_turn(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        positions = self._positions_by_row()
        kind = torch.promote_types(dtype, torch.float32).to_complex()
        turn = torch.empty(*positions.shape, self.frequencies.inv_freq.shape[-1], dtype=kind, device=device)
        tokens = max(1, TURN_CHUNK // turn.shape[-1])
        for first in range(0, positions.shape[1], tokens):
            part = slice(first, first + tokens)
            cos, sin = cos_sin(positions[:, part].to(device), self.frequencies.columns(part), dtype)
            turn.real[:, part], turn.imag[:, part] = cos, sin
        return turn

    def rope(self, device: torch.device) -> tuple[torch.Tensor, RotaryFrequencies]:
        """Positions (batch or 1, num_old) int32 and frequencies, compact."""
        key = ("rope", device)
        if key not in self._made:
            inv_freq = self.frequencies.inv_freq.to(device).float().contiguous()
            positions = self._positions_by_row().to(device, torch.int32).contiguous()
            self._made[key] = positions, self.frequencies._replace(inv_freq=inv_freq)
        return self._made[key]

    def in_tiles(self, device: torch.device, tile: int, dtype: torch.dtype, starts: int = 1) -> TurnInTiles | None:
        """[`turn`] as a product of what turns the first tokens of each tile, as many as `starts`, and what turns a
        tile's tokens from the first. None where tokens have frequencies of their own."""
        if self.frequencies.inv_freq.ndim > 1:
            return None
        key = (device, tile, dtype, starts)
        if key not in self._made:
            sequence = self._in_sequence(device)
            positions = self._positions_by_row().to(device, torch.int32) if sequence is None else sequence
            turn = TurnInTiles.of(positions.contiguous(), self.frequencies, tile, dtype, starts)
            self._made[key] = turn if sequence is None else turn._replace(positions=None)
        return self._made[key]

    def _positions_by_row(self) -> torch.Tensor:
        """(batch, num_old), or (1, num_old) if all rows are known to be alike."""
        first = self.positions[:1]
        alike = self.uniform and (len(self.positions) == 1 or bool((first == self.positions).all()))
        return first if alike else self.positions

    def _in_sequence(self, device: torch.device) -> torch.Tensor | None:
        """(1, num_old) int32 if they are known to follow one another, in all rows alike; else None."""
        if not self.uniform:
            return None
        positions = self.positions.to(device, torch.int32)
        steps = torch.arange(positions.shape[1], device=device)
        return positions[:1] if bool((positions == positions[:1, :1] + steps).all()) else None
