"""Ways to be almost the same decoder as another family, and so a wrong one."""

from tests.mutants.mutant import Mutant

CONFIG, ROPE, LLAMA = "nanopost/models/config.py", "nanopost/models/rope.py", "nanopost/models/llama.py"
ATTENTION, CACHE = "nanopost/models/attention.py", "nanopost/models/cache.py"
GOLDEN = "tests/models/test_families.py::test_logits_are_the_golden_ones"
WEIGHTS = "tests/models/test_weights.py"

MUTANTS = [
    Mutant(
        name="head-width-from-the-hidden-size",
        source="our own",
        story="head_dim in the file is passed over: heads of another width than hidden / heads do not load.",
        file=CONFIG,
        before='raw["hidden_size"] // heads if raw.get("head_dim") is None else raw["head_dim"]',
        after='raw["hidden_size"] // heads',
        killer=f"{GOLDEN}[llama]",
    ),
    Mutant(
        name="new-spelling-alone",
        source="our own",
        story="Only rope_parameters is written: an older reader drops the scaling and says nothing.",
        file=CONFIG,
        before='"rope_scaling": scaling,',
        after='"rope_scaling": None,',
        killer=f"{WEIGHTS}::test_either_spelling_says_all",
    ),
    Mutant(
        name="window-of-no-layer-taken-for-all",
        source="our own",
        story="Qwen's files name a window and say that it is not used: every layer gets it.",
        file=CONFIG,
        before='window = window if raw.get("use_sliding_window") and kinds',
        after="window = window if kinds",
        killer=f"{WEIGHTS}::test_qwens_window_is_that_of_all_layers_or_none",
    ),
    Mutant(
        name="yarn-without-its-temperature",
        source="our own",
        story="Positions are stretched, cos and sin are not: attention is flatter than the model knows.",
        file=ROPE,
        before='if scaling.rope_type != "yarn":',
        after="if True:",
        killer=f"{GOLDEN}[llama, yarn]",
    ),
    Mutant(
        name="yarn-counts-turns-in-the-stretched-length",
        source="our own",
        story="c takes s · L for L: the wrong pairs are slowed down.",
        file=ROPE,
        before="math.log(length / (2 * math.pi * beta))",
        after="math.log(scaling.factor * length / (2 * math.pi * beta))",
        killer=f"{GOLDEN}[llama, yarn]",
    ),
    Mutant(
        name="llama3-slows-the-fast-pairs",
        source="our own",
        story="g is taken for its opposite: near words are smeared, far ones are as they were.",
        file=ROPE,
        before="(turns - low) / (scaling.high_freq_factor - low)",
        after="1 - (turns - low) / (scaling.high_freq_factor - low)",
        killer=f"{GOLDEN}[llama, llama3]",
    ),
    Mutant(
        name="bias-is-loaded-and-not-added",
        source="our own",
        story="Qwen2's biases are parameters that nobody reads.",
        file=LLAMA,
        before="return y if self.bias is None else y + self.bias.to(y.dtype)",
        after="return y",
        killer=f"{GOLDEN}[qwen2]",
    ),
    Mutant(
        name="keys-are-not-normed",
        source="our own",
        story="Qwen3's norm of the keys is left out.",
        file=LLAMA,
        before="self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)",
        after="self.q_norm(q).to(v.dtype), k",
        killer=f"{GOLDEN}[qwen3]",
    ),
    Mutant(
        name="window-one-too-wide",
        source="our own",
        story="A window of w positions is taken for w before a token and the token.",
        file=ATTENTION,
        before="seen &= key > column - window",
        after="seen &= key >= column - window",
        killer=f"{GOLDEN}[mistral, window of 3]",
    ),
    Mutant(
        name="window-of-the-kernel-one-too-wide",
        source="our own",
        story="FlashAttention's window counts what is before a token; it is told the token as well.",
        file=ATTENTION,
        before="window - 1 if window else -1",
        after="window if window else -1",
        killer="tests/models/test_attention.py::test_the_ragged_kernel_is_told_the_same",
    ),
    Mutant(
        name="sampler-looks-past-the-window",
        source="our own",
        story="The cache shows the whole prompt for ever: sampler and trainer part after w tokens.",
        file=CACHE,
        before="        if self.window is not None:\n",
        after="        if False:\n",
        killer=f"{GOLDEN}[mistral, window of 3]",
    ),
    Mutant(
        name="padding-behind-a-row-sees-nothing",
        source="our own",
        story="Under a window a query behind its row's end has no key: NaN, and by the backward pass in all.",
        file=ATTENTION,
        before="(start + query).minimum(end - 1)",
        after="start + query",
        killer="tests/models/test_families.py::test_a_row_alone_equals_the_row_in_a_batch[mistral-1-dtype0]",
    ),
]
