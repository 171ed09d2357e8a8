"""The sampler's KV cache: the prompt of a group once, and what each of its rows has said since.

The samples of a group share their prompt, so its keys and values are kept once and read once: the queries of
all rows of a group make one product with them. What a row has said is its own. One softmax goes over both.
Rows and groups lie without gaps: who is done leaves (`keep`), who waited comes behind those who stay
(`grow`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.models.attention import Attend, Layout, attend
from nanopost.models.config import LlamaConfig


def side_by_side(owner: Tensor, groups: int) -> tuple[Tensor, int]:
    """Where each item stands when groups lie side by side, all as wide as the widest, in their items' order.

    Args:
        owner: (n,), the group of each item, below `groups`.

    Returns:
        The places, (n,), below groups · width; and that width.
    """
    count, order = owner.bincount(minlength=groups), owner.argsort(stable=True)
    ranked, most = owner[order], int(count.max()) if groups else 0
    rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[ranked]
    places = torch.empty_like(order)
    places[order] = ranked * most + rank
    return places, most


class KVCache:
    """Keys and values of G groups' prompts (layers, G, K, P, E), and of n rows (layers, n, K, S, E).

    Args:
        config: of the model: its layers, key/value heads K and head width E.
        length: S, the tokens that a row may say.
        like: a tensor of the dtype and on the device to use.
    """

    def __init__(self, config: LlamaConfig, length: int, like: Tensor):
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.prompt_k, self.prompt_v = like.new_zeros(2, layers, 0, heads, 0, width)
        self.k, self.v = like.new_zeros(2, layers, 0, heads, length, width)
        self.window = config.sliding_window
        self.sizes, self.group = torch.zeros(2, 0, dtype=torch.long, device=like.device)
        self._seat()

    def keep(self, rows: Tensor, groups: Tensor) -> None:
        """Drop the rows and the groups that are not named; the group of a row that stays must stay."""
        place = torch.zeros_like(self.sizes)
        place[groups] = torch.arange(len(groups), device=place.device)
        self.group, self.sizes = place[self.group[rows]], self.sizes[groups]
        longest = int(self.sizes.max()) if len(groups) else 0
        self.prompt_k, self.prompt_v = (x[:, groups, :, :longest] for x in (self.prompt_k, self.prompt_v))
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self._seat()

    def grow(self, sizes: Tensor, group: Tensor) -> None:
        """Make room for groups whose prompts have these sizes, and then for a row in each `group` named."""
        self.sizes, self.group = torch.cat([self.sizes, sizes]), torch.cat([self.group, group])
        more = int(self.sizes.max()) - self.prompt_k.shape[3]
        room = (0, 0, 0, more, 0, 0, 0, len(sizes))
        self.prompt_k, self.prompt_v = F.pad(self.prompt_k, room), F.pad(self.prompt_v, room)
        room = (0, 0, 0, 0, 0, 0, 0, len(group))
        self.k, self.v = F.pad(self.k, room), F.pad(self.v, room)
        self._seat()

    def _seat(self) -> None:
        """`members` (G, M) are the rows of each group, `seat` (n,) the place of each row among them.

        `seated`: the rows lie as their groups have them, M each, so that they need not be gathered.
        """
        groups, rows = len(self.sizes), torch.arange(len(self.group), device=self.group.device)
        self.seat, most = side_by_side(self.group, groups)
        members = rows.new_zeros(groups * most)
        members[self.seat] = rows
        self.members, self.seated = members.view(groups, most), torch.equal(members, rows)

    def _together(self, x: Tensor) -> Tensor:
        """What rows have (n, K, H/K, ·) as their groups have it (G, K, M · H/K, ·)."""
        members = x.unflatten(0, self.members.shape) if self.seated else x[self.members]
        return members.transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor, share: int) -> Tensor:
        """`_together` undone."""
        members = x.unflatten(2, (-1, share)).transpose(1, 2).flatten(0, 1)
        return members if self.seated else members[self.seat]

    def prefill(self, prompts: Layout) -> Attend:
        """Attention among prompts, a row each, whose keys and values become those of the last groups."""
        count, longest = prompts.places.shape

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for new, kept in ((k, self.prompt_k), (v, self.prompt_v)):
                kept[layer, -count:, :, :longest] = new[prompts.places].transpose(1, 2)
            return attend(prompts, layer, q, k, v)

        return look

    def decode(self, said: Tensor, columns: int) -> Attend:
        """Attention of one new token a row over the prompt of its group and what the row has said.

        Args:
            said: (n,), the tokens that each row has said before this one: the column to write.
            columns: how many to look at, more than any of `said`.
        """
        prompt = torch.arange(self.prompt_k.shape[3], device=said.device) < self.sizes[self.group, None]
        own = torch.arange(columns, device=said.device) <= said[:, None]
        if self.window is not None:
            place = self.sizes[self.group] + said
            prompt &= torch.arange(prompt.shape[1], device=said.device) > place[:, None] - self.window
            own &= torch.arange(columns, device=said.device) > said[:, None] - self.window
        hidden = ~torch.cat([prompt, own], dim=1)[:, None, None]
        sizes, (_, n, heads, length, _) = [prompt.shape[1], columns], self.k.shape
        column = (
            torch.arange(n * heads, device=said.device).view(n, heads) * length + said[:, None]
        ).flatten()

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for new, kept in ((k, self.k), (v, self.v)):
                kept[layer].view(n * heads * length, -1).index_copy_(0, column, new.flatten(0, 1).to(kept))
            own_k, own_v = self.k[layer, :, :, :columns], self.v[layer, :, :, :columns]
            share = q.shape[1] // k.shape[1]
            queries = (q * q.shape[2] ** -0.5).unflatten(1, (-1, share))  # (n, K, H/K, E)
            prompt = self._apart(self._together(queries) @ self.prompt_k[layer].mT, share)
            scores = torch.cat([prompt, queries @ own_k.mT], dim=-1).masked_fill_(hidden, -torch.inf)
            to_prompt, to_own = scores.softmax(-1).split(sizes, dim=-1)
            seen = self._apart(self._together(to_prompt) @ self.prompt_v[layer], share)
            return (seen + to_own @ own_v).flatten(1, 2)

        return look
