"""Windows that merge while they are learnt, in one stage: the teacher solves the parts, the student puts them together.

Each of K windows is cut into 2^merges parts. From the start of every part a chord leads to the end of the widest window
that begins there: parts of odd number keep their own end, every second one reaches over two parts, every fourth over
four, the first of a window to the window's end. The teacher solves the part alone; the rest of a longer chord is what
the student itself makes of the shorter ones that follow, each of which begins where no longer one does:

    z_end of part 0 of 4 = S_2(S_1(T_0(z)))

with T_0 the teacher's solve of part 0 and S_1, S_2 the student's steps over part 1 and over parts 2 and 3.

Progressive reflow's merges (ProReflow, arXiv 2503.04824) with the "previous" teacher are the same chords, learnt one
stage after the other. That the student makes its own targets while it trains is of self-consistent flow matching (SCFM,
arXiv 2510.17858), of which the abstract was read and the rest is inferred. There both halves of a target are the
student's. A network that is not told how long its step is cannot give both the short and the long chord from one
point, so the mean of two consecutive velocities (v_0 + v_1)/2, mixed with the teacher's own T_0 in a share 1 - s, has
its fixed point at ((1 - s) T_0 + s v_1/2)/(1 - s/2): the chord's own (T_0 + v_1)/2 for s = 2/3 alone, and no longer so
where a mean is taken of such means. Here the first part is always the teacher's, and the exact chords are the only
fixed point at every share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reflow_kernels import guided_step

from .chord import ChordTable
from .schedule import network_time
from .windows import Windows


def levels(count: int, merges: int) -> tuple[int, ...]:
    """Of each of `count` parts how often its chord is doubled: 2, 0, 1, 0 for a window merged twice.

    Raises ValueError where the parts do not make whole windows.
    """
    size = 1 << merges if merges >= 0 else 0
    if not size or count % size:
        raise ValueError(f"{count} parts cannot be merged {merges} times; their number must be a multiple of 2^merges.")
    return tuple((i & -i).bit_length() - 1 if i else merges for i in range(size)) * (count // size)


def ends(parts: Windows, merges: int) -> tuple[float, ...]:
    """The clean end of each part's chord."""
    return tuple(parts.boundaries[k + 2**level] for k, level in enumerate(levels(len(parts), merges)))


class Merger:
    """Finishes chords that the teacher has begun: from the end of a part to the end of the chord that starts with it.

    table: of all parts, each with the end of its own chord (`ChordTable(..., ends=ends(parts, merges))`).
    share: of the loss that falls to the chords which the student finishes; half of all chords are such.
    """

    def __init__(self, table: ChordTable, merges: int, *, share: float = 0.5, network_time_mode: str = "index") -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"self_share is {share}; it must lie between 0 and 1, both of which teach a half only.")
        self.levels = torch.tensor(levels(len(table), merges))
        self.merges, self.share, self.device, self.dtype = merges, share, table.device, table.dtype
        exact = table.to("cpu", torch.float64)
        every = torch.arange(len(table))
        state, output = exact.end_coefficients(every, exact.t_start)
        self._state, self._output = (value.to(self.device, self.dtype) for value in (state, output))
        self._timestep = network_time(exact.t_start, network_time_mode).to(self.device, torch.float32)
        self.weight = torch.where(self.levels > 0, 2.0 * share, 2.0 * (1.0 - share)).to(self.device, self.dtype)

    @torch.no_grad()
    def finish(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        z: Tensor,
        part: Tensor,
        *,
        input_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """z [B, ...] at the end of parts [B] (on the CPU) -> z at the ends of their chords, one step a doubling.

        model(model_input, timestep, rows) -> the student's output for these rows [R] of the batch, all on the device.
        """
        z, level = z.to(self.dtype).clone(), self.levels[part]
        for n in range(self.merges):
            here = (level > n).nonzero()[:, 0]
            if not len(here):
                break
            rows, step = here.to(self.device), (part[here] + 2**n).to(self.device)
            state = z[rows]
            output = model(state.to(input_dtype or self.dtype), self._timestep[step], rows)
            z[rows] = guided_step(state, output, self._state[step], self._output[step], input_dtype=self.dtype)[0]
        return z

    def evaluations(self, trained: Tensor) -> float:
        """The student's network rows a pair, in the mean over the trained parts."""
        return float(self.levels[trained.cpu()].double().mean())
