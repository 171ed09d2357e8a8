r"""chat: messages to text, and which parts of it are trained on. Exact texts, no gradient.

The template is the pages' ChatML as a jinja program of the hub's kind, whose `tojson` leaves <, >, & and
letters beyond ASCII as they are.
"""

import json
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec
from layout import Unit

CHATML = (
    r"{%- for message in messages %}"
    r"{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    r"{%- for call in message.tool_calls or [] %}"
    r"{{- '<call>' + call | tojson + '</call>' }}"
    r"{%- endfor %}"
    r"{{- '<|im_end|>\n' }}"
    r"{%- endfor %}"
    r"{%- if add_generation_prompt %}"
    r"{{- '<|im_start|>assistant\n' }}"
    r"{%- endif %}"
)
GIVEN = {"messages": Drawn(""), "template": Drawn("")}


def written(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the pages take them: tool calls as JSON texts."""
    return [
        message | {"calls": [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]}
        for message in messages
    ]


def text(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call, which returns one text."""
    yield [written(inputs["messages"])], [()]


def samples(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call, which returns two texts for each sample."""
    places = [(name, i) for i in range(case.sizes["N"]) for name in ("shown", "emitted")]
    yield [written(inputs["messages"])], places


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def assistant(content: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def lookup(**arguments: Any) -> dict[str, Any]:
    return {"name": "lookup", "arguments": arguments}


ONE = [user("What is 12 + 30?"), assistant("42")]
TWO = [system("Answer briefly."), *ONE, user("And less 2?"), assistant("40")]
TOOLS = [
    system("You may look accounts up."),
    user("What is the balance of A-17?"),
    assistant("I look it up.", lookup(account="A-17")),
    tool('{"balance": 482.5}'),
    assistant("It is 482.50."),
]
PARALLEL = [
    user("A-17 and B-3?"),
    assistant("", lookup(account="A-17"), lookup(account="B-3", day=None)),
    tool("482.5"),
    tool("no such account"),
    assistant("", lookup(account="B-03")),
    tool("-7.25"),
    assistant("482.50 and −7.25."),
]
UNICODE = [user("Grüße, 世界 👋🏽"), assistant("naïve café: 1 ½ €", lookup(name="Ölfaß 🛢", ok=True))]
SPACES = [user("  two before,\n\na blank line, a tab\t and one behind "), assistant("\n- a\n- b\n")]
MARKUP = [
    user("{{ 7 * 7 }} {% if x %} <b>&amp;</b>"),
    assistant('it\'s "so"', lookup(q="a < b & 'c' > \"d\"")),
]
THINK = [
    user("Why?"),
    assistant("<think>\nhm\n</think>\n\nBecause."),
    user("Sure?"),
    assistant("<think>no</think>Yes."),
]


def chat(name: str, messages: list[dict[str, Any]], prompt: bool) -> Case:
    return Case(name, {"add_generation_prompt": prompt}, given={"messages": messages, "template": CHATML})


def turns(name: str, messages: list[dict[str, Any]], count: int, context: int = 0) -> Case:
    given = {"messages": messages, "template": CHATML}
    return Case(name, {"context": context}, given=given, sizes={"N": count})


RENDER = Spec(
    "render",
    inputs=GIVEN,
    layout=text,
    masked="",
    cases=(
        chat("one turn", ONE[:1], False),
        chat("one turn, ready for the answer", ONE[:1], True),
        chat("nothing but the prompt", [], True),
        chat("two questions", TWO, False),
        chat("a tool call and its result", TOOLS, False),
        chat("behind a tool result", TOOLS[:4], True),
        chat("several calls, an empty text", PARALLEL, False),
        chat("letters beyond ASCII", UNICODE, True),
        chat("spaces and line ends stay", SPACES, False),
        chat("nothing in a message is markup", MARKUP, False),
        chat("reasoning", THINK, False),
        chat("an empty answer", [user(""), assistant("")], False),
    ),
)

RECORD_SAMPLES = Spec(
    "record_samples",
    inputs=GIVEN,
    layout=samples,
    masked="",
    output={"shown": "N", "emitted": "N"},
    cases=(
        turns("one answer", ONE, 1),
        turns("two answers", TWO, 2),
        turns("the first turn is given", TWO, 1, context=3),
        turns("a tool call and the final answer", TOOLS, 2),
        turns("the call is given", TOOLS, 1, context=3),
        turns("several calls in two turns", PARALLEL, 3),
        turns("letters beyond ASCII", UNICODE, 1),
        turns("spaces and line ends stay", SPACES, 1),
        turns("nothing in a message is markup", MARKUP, 1),
        turns("reasoning is emitted", THINK, 2),
        turns("an empty answer is a stop token", [user("Say nothing."), assistant("")], 1),
        turns("a question behind the last answer", [*ONE, user("Thanks.")], 1),
    ),
)

SPECS = (RENDER, RECORD_SAMPLES)
