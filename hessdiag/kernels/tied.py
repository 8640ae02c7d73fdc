"""A table that is the head as well: what its two uses have together, in products of the Hessian.

Rows of a table W are looked up, a_t = W[i_t], and its transpose makes the outputs, f_t = W h_t, h_t depending on W. Of
a sample the rows that it looks up have in the diagonal, beside the look-up's own share and the head's (closed,
`Propagator.heads`), the mixed terms

    2 sum_t (d2l/df_t dW_vj) h_tj + 2 sum_t (dl/df_tv) (dh_tj/dW_vj),

the second of which is that of W h_t as a product. Both are nothing for the rows that it does not look up. A vector on
the look-up's output that is the same at equal rows is a step W' of the table, v_t = W'[i_t]. It moves f by W' h, and
what pulls at h by (dl/df) W'; at the table come back f-bar h and (dl/df) h-dot, h-dot being what pulls at dl/dh. The
head's share alone is not meant, and left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph import LayerKind, edge_shape


class Tied:
    """One look-up and one head on the same table, on one batch; `edges` are the head's output and its input."""

    def __init__(self, look_up: LayerKind, head: LayerKind) -> None:
        numbers, given = look_up.looked_up(), head.given_rows()
        assert numbers is not None
        assert given is not None
        node: Any = head.layer.node
        slot = head.given(node)
        assert slot is not None
        self.edges = (head.layer.edge, GradientEdge(*node.next_functions[slot]))
        self._given = given
        times = (numbers[:, :, None] == numbers[:, None, :]).sum(2)
        self._share = torch.where(numbers < 0, 0.0, 1.0 / times)[:, :, None].to(given.dtype)
        self._numbers = numbers.clamp(min=0)[:, None, :].expand(-1, given.shape[1], -1)

    @classmethod
    def serves(cls, look_up: LayerKind, head: LayerKind) -> bool:
        """Whether the two are a look-up of rows and a head that applies these."""
        return look_up.looked_up() is not None and head.given_rows() is not None

    def forward(self, v: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """(h W', (dl/df) W') for a vector on the look-up's output; `slope` is dl/df."""
        step, at = self._rows(v) * self._share, self._rows(slope)
        moved = torch.zeros_like(at).scatter_add_(2, self._numbers, self._given @ step.transpose(1, 2))
        pulled = at.gather(2, self._numbers) @ step
        return moved.reshape(slope.shape), pulled.reshape(edge_shape((self.edges[1].node, self.edges[1].output_nr)))

    def back(self, outputs: Tensor | None, inputs: Tensor | None, moved: Tensor, slope: Tensor) -> Tensor:
        """What comes back at the look-up's output from f-bar, but for the head's own share, and from h-dot."""
        rows = torch.zeros(*self._share.shape[:2], self._given.shape[2]).to(self._given)
        if outputs is not None:
            own = None
            if slope.requires_grad:
                (own,) = torch.autograd.grad([slope], [self.edges[0]], [moved], retain_graph=True, allow_unused=True)
            beyond = outputs if own is None else outputs - own
            rows += self._rows(beyond).gather(2, self._numbers).transpose(1, 2) @ self._given
        if inputs is not None:
            rows += self._rows(slope).gather(2, self._numbers).transpose(1, 2) @ self._rows(inputs)
        return rows * self._share

    def _rows(self, t: Tensor) -> Tensor:
        """[samples, places, features]."""
        return t.detach().reshape(len(self._given), -1, t.shape[-1])
