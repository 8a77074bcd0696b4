"""The bars that a GPU has to reach before a speed is claimed for it, and all that no run has shown yet: data, and their tables on a page.

They were set before any measurement. The parts `bench` and `steps` measure them: a row has the number of its bar, and
says whether it is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.record import Recorded

# Positives have a cosine of 0.995: the loss is 0 to seven digits, and logits reach 50 nats.
SOLVED: dict[str, Any] = {"noise": 0.1, "temperature": 0.02}


class Contest(NamedTuple):
    """A problem that is timed against several peers; `peers` gives the least ratio of each by its name."""

    bar: int
    loss: str
    n: int
    d: int
    peers: dict[str, float]
    solved: bool = False

    def title(self) -> str:
        return f"{self.loss} N={self.n} D={self.d}{' solved' if self.solved else ''}"


RATIOS = (
    Contest(1, "nt_xent", 32_768, 128, {"eager autocast": 8.0, "compile autocast": 3.0}),
    Contest(3, "nt_xent", 32_768, 512, {"eager autocast": 5.0, "compile autocast": 2.0}),
    Contest(4, "sup_con", 16_384, 128, {"SupContrast autocast": 15.0}),
    Contest(5, "clip", 32_768, 512, {"open_clip autocast": 4.0, "inf-cl": 8.0}),
    Contest(
        11, "clip", 65_536, 768,
        dict.fromkeys(("siglip-kernel", "chunked cuBLAS", "liger-kernel", "cut-cross-entropy", "memeff"), 1.0),
    ),
    Contest(
        11, "info_nce", 65_536, 768,
        dict.fromkeys(("F.linear_cross_entropy", "chunked cuBLAS", "liger-kernel", "cut-cross-entropy", "inf-cl"), 1.0),
    ),
    Contest(1, "nt_xent", 32_768, 128, {"eager autocast": 8.0}, solved=True),
    Contest(3, "nt_xent", 32_768, 512, {"eager autocast": 5.0}, solved=True),
    Contest(5, "clip", 32_768, 512, {"open_clip autocast": 4.0}, solved=True),
    *(Contest(10, "nt_xent", n, d, {"eager autocast": 1.0, "eager": 1.0}) for n in (64, 256, 1024) for d in (128, 1024)),
    Contest(0, "moco", 65_536, 128, {"eager autocast": 1.0}),  # no bar was set: not slower
)  # fmt: skip
RATES = ((65_536, 128, 0.50), (65_536, 256, 0.60), (65_536, 512, 0.90), (65_536, 1024, 0.95))
MEMORY = (("nt_xent", 32_768, 128), ("clip", 32_768, 256), ("nt_xent", 32_768, 512), ("clip", 32_768, 768), ("nt_xent", 262_144, 128))
LARGEST = (1_048_576, 128, 3_000.0)  # rows, columns, milliseconds
# Rows, columns, a word of the kernel's name, its work in products of 2 N^2 D, and the least part of a plain product's rate. backward_rows
# computes all logits and multiplies by them. weights_block computes the logits of 36 of 64 blocks, those on and above the diagonal.
KERNELS = ((32_768, 128, "backward_rows", 2.0, 0.45), (32_768, 512, "weights_block", 36 / 64, 0.65))
# Rows, columns, and the most launches of a step: rows that a tile holds; long rows, whose N x N weights are one block here.
LAUNCHES = ((4096, 128, 6), (4096, 1024, 8 + 2))
# The host's time of a step, whatever the device does meanwhile, at most so many times that of eager.
HOST = (1024, 128, 1.5)

# The number of a bar; its case; the bar in words.
WORDS = (
    (1, "NT-Xent, N = 32,768, D = 128: time of eager under autocast; of `torch.compile` of that; over ours", "8; 3"),
    (3, "the same at D = 512", "5; 2"),
    (4, "SupCon with labels, N = 16,384, D = 128: SupContrast's formula under autocast, over ours", "15"),
    (5, "CLIP, N = 32,768, D = 512: open_clip's form under autocast; Inf-CL; over ours", "4; 8"),
    (6, "nominal rate over a plain bfloat16 product's, NT-Xent, N = 65,536, D = 128, 256, 512, 1024", "50, 60, 90, 95 %"),
    (7, "rate of the FLOP that a kernel executes over the same: `backward_rows` at D = 128; `weights_block` at D = 512", "45; 65 %"),
    (8, "memory above inputs and gradients: D up to 256; above", "3 x inputs; and 128 MiB"),
    (9, "NT-Xent, N = 1,048,576, D = 128", "3 s"),
    (10, "NT-Xent, N up to 1,024: time of eager over ours", "1"),
    (11, "N = 65,536, D = 768: `F.linear_cross_entropy`, chunked products, siglip-kernel, and the other packages, over ours", "1"),
    (12, "launches of a step, every loss as a plain mean: D = 128; D = 1024, one block", "6; 10"),
    (13, "the host's time of a step, every loss, N = 1,024, D = 128: ours over eager's", "1.5"),
)

# A claim; the parts that show it; the ways in which they do.
CLAIMS = (
    ("that compiled kernels give the right numbers on a device at all", ("tests", "check"),
     "every problem, three dtypes, default and deterministic mode, and 19 larger ragged ones; `python -m fastnce check`, all variants"),
    ("accuracy of tensor-core accumulation, which no emulation here models", ("accuracy",), "the contract at N = 32,768"),
    ("no access out of bounds, nothing read before it is written, no race", ("sanitize",),
     "0 reports of four tools on ragged shapes of every loss"),
    ("1,000 bitwise equal repeats in deterministic mode", ("tests",), "three shapes"),
    ("kernels on the current stream; launches that wait for nobody; the device of the inputs", ("tests",),
     "a side stream while the default one is busy; a second GPU, where there is one"),
    ("capture into a CUDA graph, replay with other inputs and another scale", ("tests",),
     "every loss, across the scale of 40 where a running maximum begins"),
    ("no synchronisation of the host", ("tests",), "forward and backward under torch's sync debug mode"),
    ("device memory: three times the inputs above inputs and gradients, and 128 MiB more for D > 256", ("tests", "bench"),
     "the allocator's peak"),
    ("more than 2^31 elements", ("tests",), "(2^22 + 3) x 512 rows, as keys and as queries"),
    ("that hardware reads the descriptors of TMA and wgmma as they are meant", ("build",),
     "each family of CUDA kernels on a small problem, alone"),
    ("launches of a step, and the host's time of one, also of `torch` off the CPU", ("steps",),
     "torch's profiler; a clock around steps that nobody waits for"),
    ("any speed", ("bench",), "the bars below"),
    (
        "that the proof passes which `\"auto\"` asks for, and finds what is wrong on a device",
        ("check",),
        "`python -m fastnce check`: every variant of both backends right",
    ),
    (
        "which of the kernels is first at which shape: `\"auto\"` takes `triton` before `cuda` unmeasured, and both before `torch`",
        ("race",),
        "240 shapes, all kernels in turn",
    ),
    ("that the shipped tiles are good ones", ("tiles",), "variants in turn with them"),
)  # fmt: skip
ELSEWHERE = (
    "A run shows nothing of another GPU. AMD GPUs are admitted, and no kernel has run on one. GPUs of compute capability 8.6, 8.9 and 12\n"
    "take the tiles of 8.0, which may not fit their smaller shared memory. Two GPUs in one process are in `tests`, where a machine has two."
)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _newest(parts: Sequence[Recorded]) -> dict[str, Recorded]:
    """The newest recorded run of each part; `parts` begin with the newest."""
    return {run.content["part"]: run for run in reversed(parts)}


def verdict(number: int, parts: Sequence[Recorded]) -> str:
    """Of a bar: how many of its rows are met, in the newest run of its part, and on which GPU."""
    run = _newest(parts).get("steps" if number >= 12 else "bench")
    if run is None:
        return "not measured"
    marks = [row["met"] for row in run.rows if row["bar"] == number]
    judged = [mark for mark in marks if mark is not None]
    still = f", {len(marks) - len(judged)} open" if len(judged) < len(marks) else ""
    word = "no row" if not marks else "yes" if judged and all(judged) else "**no**" if judged else "open"
    return f"{word}: {sum(judged)} of {len(judged)}{still}; {run.env['gpu']['name']}, {run.env['time'][:10]}" if judged else word


def table(parts: Sequence[Recorded]) -> str:
    """All bars, and whether they are met."""
    rows = [(str(n) if n > 1 else "1, 2", case, bar, verdict(n, parts)) for n, case, bar in WORDS]
    head = ("#", "case, bfloat16, forward and backward with normalisation", "bar", "met")
    return "\n".join([_row(head), "|--:|---|---|---|", *map(_row, rows)])


def unshown(parts: Sequence[Recorded]) -> str:
    """The claims of which some part has no recorded run that passed."""
    newest = _newest(parts)
    passed = {name for name, run in newest.items() if not run.content["errors"]}
    rows = [(claim, ", ".join(f"`{name}`" for name in by), how) for claim, by, how in CLAIMS if not passed.issuperset(by)]
    runs = "; ".join(sorted(f"`{name}` on {run.env['gpu']['name']}, {run.env['time'][:10]}" for name, run in newest.items()))
    begin = f"Recorded runs on a GPU: {runs}." if runs else "No run on a GPU is recorded."
    if not rows:
        return f"{begin} Every part has passed.\n\n{ELSEWHERE}"
    head = [_row(("what", "shown by", "what would show it")), "|---|---|---|"]
    return "\n".join(
        [begin + " Everything below is unshown until a file of `bench/results/` shows it:", "", *head, *map(_row, rows), "", ELSEWHERE]
    )
