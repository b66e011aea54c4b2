"""What has turned the keys that are compressed, in the forms that attention wants, each made once for all layers.

Base of what one forward sees, of a growing cache (step.py) and of one of fixed size (static_tokens.py).
"""

from __future__ import annotations

import torch

from .rope import RotaryFrequencies, TurnInTiles, cos_sin, widened

TURN_CHUNK = 2**17  # cos that are computed at a time; intermediates are several times the result


class OldTurns:
    """The turns of the latents' keys.

    Attributes:
        old_frequencies: that turned them.
    """

    old_frequencies: RotaryFrequencies
    _turn: dict  # what was made, by what was asked for

    def _positions_by_row(self) -> torch.Tensor:
        """Positions of the latents, (batch, num_old), or (1, num_old) if all rows are known to be alike."""
        raise NotImplementedError

    def _in_sequence(self, device: torch.device) -> torch.Tensor | None:
        """(1, num_old) int32 positions if they are known to follow one another, in all rows alike; else None."""
        return None

    def old_cos_sin(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the latents' keys, rounded to the model's dtype, in float32 or wider, (batch or 1, num_old,
        head_dim / 2)."""
        key = ("cos_sin", device, dtype)
        if key not in self._turn:
            self._turn[key] = widened(cos_sin(self._positions_by_row().to(device), self.old_frequencies, dtype))
        return self._turn[key]

    def old_turn(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[`old_cos_sin`] as complex numbers, or for a compiler, which knows none, side by side, (batch or 1, num_old,
        head_dim / 2, 2)."""
        key = (device, dtype)
        if key not in self._turn:
            compiling = torch.compiler.is_compiling()
            self._turn[key] = torch.stack(self.old_cos_sin(*key), dim=-1) if compiling else self._complex_turn(*key)
        return self._turn[key]

    def _complex_turn(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        positions = self._positions_by_row()
        kind = torch.promote_types(dtype, torch.float32).to_complex()
        turn = torch.empty(*positions.shape, self.old_frequencies.inv_freq.shape[-1], dtype=kind, device=device)
        tokens = max(1, TURN_CHUNK // turn.shape[-1])
        for first in range(0, positions.shape[1], tokens):
            part = slice(first, first + tokens)
            cos, sin = cos_sin(positions[:, part].to(device), self.old_frequencies.columns(part), dtype)
            turn.real[:, part], turn.imag[:, part] = cos, sin
        return turn

    def old_rope(self, device: torch.device) -> tuple[torch.Tensor, RotaryFrequencies]:
        """Positions (batch or 1, num_old) int32 and frequencies, compact."""
        key = ("rope", device)
        if key not in self._turn:
            inv_freq = self.old_frequencies.inv_freq.to(device).float().contiguous()
            positions = self._positions_by_row().to(device, torch.int32).contiguous()
            self._turn[key] = positions, self.old_frequencies._replace(inv_freq=inv_freq)
        return self._turn[key]

    def old_turn_in_tiles(
        self, device: torch.device, tile: int, dtype: torch.dtype, starts: int = 1
    ) -> TurnInTiles | None:
        """[`old_turn`] as a product of what turns the first tokens of each tile, as many as `starts`, and what turns a
        tile's tokens from the first. None where tokens have frequencies of their own."""
        if self.old_frequencies.inv_freq.ndim > 1:
            return None
        key = (device, tile, dtype, starts)
        if key not in self._turn:
            sequence = self._in_sequence(device)
            positions = self._positions_by_row().to(device, torch.int32) if sequence is None else sequence
            turn = TurnInTiles.of(positions.contiguous(), self.old_frequencies, tile, dtype, starts)
            self._turn[key] = turn if sequence is None else turn._replace(positions=None)
        return self._turn[key]
