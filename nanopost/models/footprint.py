"""What a model takes in memory while it trains: formulas of its `config.json`, nothing is allocated.

Every term is a function of a `Job`, in bytes of one rank, with its formula in the docstring. The sampler's
are in `rollout/footprint.py`; `nanopost/plan.py` adds them up, docs/scale.md has them beside what was
measured. Letters: P numbers of a model, N tokens of a micro-batch, M of them trained on, L blocks, I numbers
between gate and down, S tokens that a row may say; b bytes of a number in products: 4, or 2 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from nanopost.models.config import LlamaConfig

NF4 = 4.127 / 8  # bytes a weight (models/quant.py)
# The kernels' sizes (kernels/dispatch.py, data/collate.py): the tests hold them to each other.
SHORT, SHARED, CHUNK, LEAST, TILE = 64, 16, {"cpu": 2**20, "cuda": 2**29}, 256, {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The numbers of a run that its memory depends on."""

    config: LlamaConfig  # of what trains
    head: str = "alike"  # what reads the hidden states: "alike" (SFT), "logps", "logits" or "score"
    stored: int = 8  # with "logits": how many tensors of their size a loss makes; 8 are top-k's and top-p's
    seen: float = 0  # likewise, what an evaluation makes
    micro_batch: int  # rows of a forward pass, at most those that there are
    pair: int = 1  # rows that a script counts as one: 2 of a pair
    rows: int  # of an optimiser step, on one rank
    length: int  # T, tokens of the longest row; of sampled rows the longest prompt's
    group: int = 1  # rows that share a prompt
    new: int = 0  # tokens that a sampled row may say; 0: nothing is sampled
    slots: int = 256  # rows decoded at a time
    sampled: int = 0  # rows sampled in a step, on one rank
    held_out: int = 0  # rows of an evaluation, on one rank
    rank: int = 0  # of an adapter; 0: all weights train
    targets: tuple[str, ...] = ()  # the projections that have it
    nf4: bool = False  # their frozen weights in four bits
    copies: int = 0  # frozen models of the policy's own format: the reference
    frozen: tuple[LlamaConfig, ...] = ()  # frozen models in float32
    critic: LlamaConfig | None = None  # trains as the policy does
    guest: Job | None = None  # a frozen model's, gone before step 1: it writes the data, or scores it
    ranks: int = 1  # that share a model between them
    device: str = "cpu"
    bf16: bool = False
    recompute: bool = False  # a block keeps its input alone and is computed again in backward
    offload: bool = False  # weights, gradients and moments wait on the host


# ---- what stands all the time ------------------------------------------------------------------------------
def matrices(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a block's seven projections."""
    D, wide, HE, KE = c.hidden_size, c.intermediate_size, *heads(c)
    sizes = ((D, HE), (D, KE), (D, KE), (HE, D), (D, wide), (D, wide), (wide, D))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return dict(zip(names, sizes, strict=True))


def heads(c: LlamaConfig) -> tuple[int, int]:
    """H·E of the queries and K·E of keys or values."""
    return c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def block_size(c: LlamaConfig) -> int:
    """Numbers of a block: Σ in·out, two norms of D; Qwen2: biases, Qwen3: two norms of E."""
    HE, KE = heads(c)
    extra = c.qkv_bias * (HE + 2 * KE) + c.qk_norm * 2 * c.head_dim
    return sum(a * b for a, b in matrices(c).values()) + 2 * c.hidden_size + extra


def root_size(c: LlamaConfig) -> int:
    """Numbers outside the blocks: embedding V·D, head V·D unless it is tied, the last norm's D."""
    return c.vocab_size * c.hidden_size * (2 - c.tie_word_embeddings) + c.hidden_size


def size(c: LlamaConfig) -> int:
    """P, the numbers of a model: L blocks and what is outside them."""
    return c.num_hidden_layers * block_size(c) + root_size(c)


def trained(job: Job, c: LlamaConfig) -> int:
    """Numbers that train: P, or with an adapter of rank r: L Σ r·(in + out) over its projections."""
    if not job.rank:
        return size(c)
    return c.num_hidden_layers * sum(job.rank * sum(matrices(c)[name]) for name in job.targets)


def quantised(job: Job, c: LlamaConfig) -> int:
    """Weights in four bits: those of an adapter's projections."""
    numbers = (a * b for n, (a, b) in matrices(c).items() if job.nf4 and n in job.targets)
    return c.num_hidden_layers * sum(numbers)


def weights(job: Job, c: LlamaConfig) -> int:
    """4·P, and 4 bytes a number of an adapter, over ranks; 4.127 bits a weight in NF4, all on every rank."""
    count, codes = size(c), quantised(job, c)
    return ceil(4 * (count - codes + trained(job, c) * (job.rank > 0)) / job.ranks) + round(NF4 * codes)


def _trains(job: Job) -> int:
    """Numbers that train, the critic's among them."""
    return trained(job, job.config) + (trained(job, job.critic) if job.critic else 0)


def standing(job: Job) -> dict[str, int]:
    """What is there all the time: weights, frozen models (4·P), Adam's two moments; of n ranks each has 1/n.

    With offload all of it is on the host, and none on a GPU.
    """
    own = weights(job, job.config) + (weights(job, job.critic) if job.critic else 0)
    others = job.copies * weights(job, job.config) + sum(ceil(4 * size(c) / job.ranks) for c in job.frozen)
    terms = {"weights": own, "frozen models": others, "Adam": ceil(8 * _trains(job) / job.ranks)}
    return {name: 0 if job.offload and job.device == "cuda" else value for name, value in terms.items()}


def gathered(job: Job) -> int:
    """What FSDP has whole: all but the blocks, 4 bytes a number, and b of two blocks: one and the next.

    And the gradient of a block before it is shared out, 4 bytes a number.
    """
    if job.ranks == 1 and not job.offload:
        return 0
    return 4 * root_size(job.config) + (2 * width(job) + 4 * (not job.rank)) * block_size(job.config)


def width(job: Job) -> int:
    """b, bytes of a number in products."""
    return 2 if job.bf16 else 4


def _has(job: Job, name: str) -> bool:
    """Whether a projection's weight, or its adapter's, gets a gradient: then what it read is kept."""
    return not job.rank or name in job.targets


# ---- a micro-batch forward and backward --------------------------------------------------------------------
def tokens(job: Job) -> tuple[int, int, int]:
    """N tokens of a micro-batch, M of them trained on, and the keys that its rows look at.

    Data: rows·T, all three. Sampled: a group's prompt is there once, N = prompts·T + rows·S, M = rows·S; each
    of its rows looks at a copy of it, rows·(T + S).
    """
    rows = min(job.micro_batch, job.rows)
    if not job.new:
        return rows * job.length, rows * job.length, rows * job.length
    share = job.group if job.length >= SHARED else 1
    return ceil(rows / share) * job.length + rows * job.new, rows * job.new, rows * (job.length + job.new)


def kept_by_block(job: Job) -> int:
    """What autograd keeps of one block: N·(4·2(D + 1) + b·(n·D + q) + 4·H + b·3I) for all weights in float32.

    The residual before both norms and their rates, 2(D + 1); what the projections read, n·D: one copy a norm
    in float32 (n = 2), one a projection in bfloat16 (n = 5); queries, keys, values and output, and what it
    adds up to a head; gate, up and their product. A projection without a gradient of its own keeps no input.
    """
    c, b, (N, M, keys) = job.config, width(job), tokens(job)
    D, wide, (HE, KE), H = c.hidden_size, c.intermediate_size, heads(c), c.num_attention_heads
    read = [n for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if _has(job, n)]
    copies = len(read) if job.bf16 else len({n in ("gate_proj", "up_proj") for n in read})
    per_token = 8 * (D + 1) + b * (copies * D + 2 * wide + wide * _has(job, "down_proj"))
    per_token += b * job.rank * len(job.targets) + c.qk_norm * (
        b * (HE + KE) + 4 * (H + c.num_key_value_heads)
    )
    row = job.length + job.new
    if job.device == "cpu" and row <= SHORT:  # scores are kept, keys and values for each query head
        attention = b * (N * 2 * HE + keys * 2 * HE + N * H * row)
    else:  # a flash kernel; on a GPU it takes as many key/value heads as query heads
        attention = b * (N * 2 * HE + keys * 2 * (HE if job.device == "cuda" else KE)) + 4 * N * H
        ragged = job.device == "cpu" and row < N  # several rows are gathered by length, and put back
        attention += b * N * HE * (ragged and _has(job, "o_proj"))
        attention += 4 * M * row * (job.device == "cpu" and bool(job.new))  # its mask
    return N * per_token + attention


def activations(job: Job) -> int:
    """L times `kept_by_block`, the last norm's N·D and the angles N·E; with recompute a block keeps 4·N·D."""
    c, N = job.config, tokens(job)[0]
    block = 4 * N * c.hidden_size if job.recompute else kept_by_block(job) + casts(job)
    return c.num_hidden_layers * block + 4 * N * (c.hidden_size + c.head_dim)


def casts(job: Job) -> int:
    """The copies of a block's matrices that bfloat16's products keep, 2 bytes a weight; FSDP has its own."""
    return 2 * sum(a * b for a, b in matrices(job.config).values()) * (job.bf16 and not gathered(job))


def logits(job: Job) -> int:
    """What the head takes at most; all logits are stored for top-k, top-p and distillation alone.

    alike: max(C·V + V·D, 2·V·D) and 3·M·D: a chunk of C tokens' logits; the head's gradient, made in the
    forward pass, and that one scaled. logps: a tile with V·D, or two tiles, and 4·M·D. logits: V·D and
    stored·M·V. score: 2·M·D. Times 4 bytes. A frozen head has no gradient; in bfloat16 a copy, 2·V·D bytes.
    """
    c, b, (_, M, _) = job.config, width(job), tokens(job)
    V, MD, matrix = c.vocab_size, c.hidden_size * tokens(job)[1], 4 * c.vocab_size * c.hidden_size
    head, cast = matrix * (not job.rank), matrix // 2 * job.bf16
    if job.head == "alike":
        chunk = max(LEAST, min(CHUNK[job.device] // V, M)) * V * (b if job.device == "cuda" else 4)
        wide = matrix * (job.bf16 and job.device == "cpu")  # there a chunk is made in float32
        return max(chunk + head + wide, 2 * head) + 4 * 3 * MD + cast
    if job.head == "logps":
        tile = 4 * LEAST * TILE["cpu"] if job.device == "cpu" else M * TILE["cuda"] * b
        return max(2 * tile, tile + head) + 4 * 4 * MD + cast
    return 4 * job.stored * M * V + head + cast if job.head == "logits" else 4 * 2 * MD


def passing(job: Job) -> int:
    """Gradients on their way through a block, 4·3·N·D + b·2·N·I, beside the head's own, 4·V·D.

    The head's is gone where it was added to the one of the micro-batch before. With recompute all that the
    block keeps but its input is made again by then.
    """
    c, N = job.config, tokens(job)[0]
    held = not job.rank and job.head != "score" and (c.tie_word_embeddings or not adds(job))
    again = job.recompute * (kept_by_block(job) + casts(job) - 4 * N * c.hidden_size)
    flow = 2 * width(job) * N * c.intermediate_size + 4 * 3 * N * c.hidden_size
    return again + flow + 4 * c.vocab_size * c.hidden_size * held


def adds(job: Job) -> bool:
    """Whether the gradients of a micro-batch are added to those of one before, or of the policy."""
    return job.micro_batch < job.rows or job.critic is not None


def reading(job: Job) -> int:
    """A micro-batch without a gradient: b·3·N·(D + I)."""
    c = job.config
    return width(job) * 3 * tokens(job)[0] * (c.hidden_size + c.intermediate_size)


def gradients(job: Job) -> int:
    """4 bytes a number that trains, of n ranks 1/n each; offloaded ones are on the host."""
    return standing(job)["Adam"] // 2


def last_gradients(job: Job) -> int:
    """Where backward ends: the embedding's gradient, 4·V·D; the head's waits for it if they are tied."""
    c = job.config
    return 0 if job.rank else 4 * c.vocab_size * c.hidden_size * (1 + c.tie_word_embeddings)


def read_again(job: Job) -> int:
    """What is written is read again, 4·P, of several ranks 8·P; under an adapter with the merged matrices."""
    c = job.config
    merged = sum(a * b for n, (a, b) in matrices(c).items() if n in job.targets) * c.num_hidden_layers
    return 4 * (size(c) * (1 + (job.ranks > 1)) + merged)
