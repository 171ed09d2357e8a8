"""Ways to read a folder as what it is not, and a message as what it does not say."""

from tests.mutants.mutant import Mutant

HEADER, FILL, LLAMA = "nanopost/models/header.py", "nanopost/models/fill.py", "nanopost/models/llama.py"
MARKERS, CHAT = "nanopost/data/markers.py", "nanopost/data/chat.py"
TEST_HEADER, TEST_WEIGHTS = "tests/models/test_header.py", "tests/models/test_weights.py"
TEST_MARKERS, TEST_CHAT = "tests/data/test_markers.py", "tests/data/test_chat.py"

MUTANTS = [
    Mutant(
        name="tensors-may-overlap",
        source="our own",
        story="Two names over the same bytes: one weight is another's, and the file looks whole.",
        file=HEADER,
        before="if entry.begin != reached:",
        after="if entry.begin > reached:",
        killer=f"{TEST_HEADER}::test_a_forged_header_is_refused_by_name",
    ),
    Mutant(
        name="name-twice-in-a-header",
        source="our own",
        story="JSON takes the last of two entries of a name; another reader may take the first.",
        file=HEADER,
        before="if len(found) < len(pairs):",
        after="if False:",
        killer=f"{TEST_HEADER}::test_a_forged_header_is_refused_by_name",
    ),
    Mutant(
        name="size-not-held-against-the-shape",
        source="our own",
        story="A tensor of another size than its shape's is given to the library, which reads what it likes.",
        file=HEADER,
        before="offsets[1] - offsets[0] != needed",
        after="offsets[1] < offsets[0]",
        killer=f"{TEST_HEADER}::test_a_forged_header_is_refused_by_name",
    ),
    Mutant(
        name="index-not-held-against-the-shards",
        source="our own",
        story="Shards of two models in one folder: whichever file has a name gives the weight.",
        file=HEADER,
        before="places.get(name) != path.name",
        after="name not in places",
        killer=f"{TEST_WEIGHTS}::test_an_index_and_its_shards_must_agree",
    ),
    Mutant(
        name="tied-in-the-config-and-not-in-the-file",
        source="transformers#30202",
        story="The file's own head is dropped for the embedding, and the model is another one.",
        file=FILL,
        before="return torch.equal(tensors[TIED], tensors[EMBEDDING])",
        after="return torch.equal(tensors[TIED], tensors[TIED])",
        killer=f"{TEST_WEIGHTS}::test_a_head_that_contradicts_tied_embeddings_is_refused",
    ),
    Mutant(
        name="padding-of-the-vocabulary-is-sampled",
        source="our own",
        story="Rows behind the tokenizer's last token are outcomes: the sampler says ids that are no token.",
        file=LLAMA,
        before="return x if self.words == x.shape[dim] else x.narrow(dim, 0, self.words)",
        after="return x",
        killer=f"{TEST_WEIGHTS}::test_padding_of_the_vocabulary_is_no_token",
    ),
    Mutant(
        name="template-in-one-place",
        source="our own",
        story="A reader that knows tokenizer_config.json alone finds no template in what a run leaves.",
        file=CHAT,
        before='if not isinstance(config.get("chat_template"), list) and config',
        after="if False and config",
        killer=f"{TEST_CHAT}::test_a_template_is_copied_to_both_of_its_places",
    ),
    Mutant(
        name="content-ends-its-turn",
        source="our own",
        story="A user who quotes a stop token ends the turn, and may open one for the assistant.",
        file=MARKERS,
        before="marked.append(_broken(message, patterns.get(message.role, every)))",
        after="marked.append(message)",
        killer=f"{TEST_MARKERS}::test_no_content_writes_a_control_token",
    ),
    Mutant(
        name="halves-of-a-token-are-joined",
        source="our own",
        story="What one content begins the next one completes, where the template writes them together.",
        file=MARKERS,
        before="if found != bare:",
        after="if False:",
        killer=f"{TEST_MARKERS}::test_a_template_that_makes_a_token_of_pieces_is_refused",
    ),
    Mutant(
        name="calls-are-not-content",
        source="our own",
        story="The arguments of a tool call are trusted, as the template writes them as JSON.",
        file=MARKERS,
        before="isinstance(value, list | tuple) else value",
        after="isinstance(value, list) else value",
        killer=f"{TEST_MARKERS}::test_no_content_writes_a_control_token",
    ),
    Mutant(
        name="assistants-cannot-think",
        source="our own",
        story="<think> in a demonstration is spelled out, and the model never says the token itself.",
        file=MARKERS,
        before="_whole(tuple(token for token in special if token in own)),",
        after="_whole(_tokens(tokenizer, special=False)),",
        killer=f"{TEST_MARKERS}::test_an_assistant_thinks_and_nobody_else_does",
    ),
]
