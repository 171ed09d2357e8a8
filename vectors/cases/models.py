"""models: LoRA merged, beside its layer and mixed in a batch; NF4 and the scales of its blocks; routing."""

import itertools
from collections.abc import Iterator
from typing import Any

import page
from case import Case, Drawn, Spec, indices, nested, shape_of
from layout import Slot, Unit

# Here S is a layer's input, D its output, K the rank and N the adapters of a bank.
NORMAL = (-1.5, 1.5)
MATRICES = {
    "weight": Drawn("DS", *NORMAL),
    "lora_A": Drawn("KS", *NORMAL),
    "lora_B": Drawn("DK", *NORMAL),
}
SMALL = {"B": 2, "T": 3, "S": 4, "D": 3, "K": 2, "N": 3}
PLAIN = {"alpha": 3.0, "rank_stabilised": False}
STABLE = {"alpha": 3.0, "rank_stabilised": True}


def whole(spec: Spec, case: Case, name: str, *at: int) -> Any:
    """An input as nested slots, from an index on."""
    shape = shape_of(spec.inputs[name].dims, case)[len(at) :]
    return nested(shape, lambda i: Slot(name, (*at, *i)))


def sized(name: str, arguments: dict[str, Any], dialect: str | None = None, **options: Any) -> Case:
    return Case(name, arguments, dialect, **({"sizes": SMALL} | options))


# ---- LoRA


def merged(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with the three matrices."""
    yield [whole(spec, case, name) for name in spec.inputs], list(indices(shape_of("DS", case)))


WEIGHT = Spec(
    "lora_weight",
    inputs=MATRICES,
    layout=merged,
    gradients=("weight", "lora_A", "lora_B"),
    masked="DS",
    cases=(
        sized("α/r", PLAIN, "PEFT, torchtune"),
        sized("α/√r", STABLE, "PEFT use_rslora"),
        sized("a mean", PLAIN, "PEFT, torchtune", mean=True),
        sized("rank 1", PLAIN, "PEFT, torchtune", sizes=SMALL | {"K": 1}),
        sized("a rank above both sides", STABLE, "PEFT use_rslora", sizes=SMALL | {"K": 5}),
        sized("square, and the rank too", PLAIN, sizes={"S": 3, "D": 3, "K": 3}),
        sized("lora_B = 0: the base", PLAIN, given={"lora_B": [[0.0, 0.0]] * 3}),
        sized("α = r: s = 1", {"alpha": 2.0, "rank_stabilised": False}),
        sized("weights of 1e4", STABLE, ranges={"weight": (-1e4, 1e4)}),
        sized("a small update", {"alpha": 1e-4, "rank_stabilised": False}),
    ),
)


def tokens(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a token with all of the layer, which returns its row."""
    (out,) = shape_of("D", case)
    matrices = [whole(spec, case, name) for name in ("weight", "lora_A", "lora_B", "bias")]
    for b, t in indices(shape_of("BT", case)):
        x, u = whole(spec, case, "hidden", b, t), whole(spec, case, "uniforms", b, t)
        yield [x, *matrices, u], [(b, t, o) for o in range(out)]


def dropped(*arguments: Any, dropout: Any, **_: Any) -> list[Any]:
    """How far each uniform is from the border."""
    return [u - dropout for u in arguments[-1]]


def dropout(p: float) -> dict[str, Any]:
    return PLAIN | {"dropout": p}


FORWARD = Spec(
    "lora_forward",
    inputs={"hidden": Drawn("BTS", -2, 2)}
    | MATRICES
    | {"bias": Drawn("D", *NORMAL), "uniforms": Drawn("BTS", 0.01, 0.99)},
    layout=tokens,
    gradients=("hidden", "weight", "lora_A", "lora_B", "bias"),
    output="BTD",
    kinks=dropped,
    cases=(
        sized("α/r", dropout(0.0), "PEFT, torchtune"),
        sized("α/√r", STABLE | {"dropout": 0.0}, "PEFT use_rslora"),
        sized("a mean", dropout(0.0), "PEFT, torchtune", mean=True),
        sized("dropout of .3", dropout(0.3), "PEFT, torchtune"),
        sized("dropout of .75, α/√r", STABLE | {"dropout": 0.75}, "PEFT use_rslora"),
        sized("dropout of 1: the base", dropout(1.0)),
        sized("lora_B = 0: the base", dropout(0.3), given={"lora_B": [[0.0, 0.0]] * 3}),
        sized("rank 1, no bias to speak of", dropout(0.0), sizes=SMALL | {"K": 1}, given={"bias": [0.0] * 3}),
        sized("square, and the rank too", dropout(0.3), sizes=SMALL | {"S": 3, "D": 3, "K": 3}),
        sized("states of 1e4", dropout(0.3), ranges={"hidden": (-1e4, 1e4)}),
    ),
)


def steps(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a step t: the t-th token of every row, and each row's adapter."""
    rows, width, out = shape_of("BTD", case)
    matrices = [whole(spec, case, name) for name in ("weight", "lora_A", "lora_B")]
    for t in range(width):
        hidden = [whole(spec, case, "hidden", b, t) for b in range(rows)]
        adapter = list(inputs["adapter"])
        yield [hidden, *matrices, adapter], [(b, t, o) for b, o in itertools.product(range(rows), range(out))]


MIXED = Spec(
    "mixed_lora_forward",
    inputs={
        "hidden": Drawn("BTS", -2, 2),
        "weight": Drawn("DS", *NORMAL),
        "lora_A": Drawn("NKS", *NORMAL),
        "lora_B": Drawn("NDK", *NORMAL),
        "adapter": Drawn("B", below="N"),
    },
    layout=steps,
    gradients=("hidden", "weight", "lora_A", "lora_B"),
    output="BTD",
    cases=(
        sized("two rows, two adapters", PLAIN, given={"adapter": [2, 0]}),
        sized("α/√r", STABLE, given={"adapter": [1, 2]}),
        sized("a mean", PLAIN, mean=True, given={"adapter": [0, 1]}),
        sized("rows that share an adapter", PLAIN, sizes=SMALL | {"B": 4}, given={"adapter": [1, 0, 1, 1]}),
        sized("one adapter for all", STABLE, given={"adapter": [1, 1]}),
        sized("a bank of one", PLAIN, sizes=SMALL | {"N": 1}, given={"adapter": [0, 0]}),
        sized("more adapters than rows", PLAIN, sizes=SMALL | {"N": 5}, given={"adapter": [4, 2]}),
        sized("one token a row", PLAIN, sizes=SMALL | {"B": 3, "T": 1}, given={"adapter": [2, 1, 0]}),
        sized(
            "a fresh adapter beside a trained one",
            PLAIN,
            sizes=SMALL | {"N": 2},
            given={"adapter": [0, 1], "lora_B": [[[0.0, 0.0]] * 3, [[0.7, -0.4], [1.1, 0.2], [-0.6, 0.9]]]},
        ),
        sized(
            "another tenant's adapter of 1e30 is not in this batch",
            PLAIN,
            sizes=SMALL | {"N": 2},
            given={
                "adapter": [0, 0],
                "lora_B": [[[0.7, -0.4], [1.1, 0.2], [-0.6, 0.9]], [[1e30, -1e30]] * 3],
            },
        ),
    ),
)


# ---- NF4


def everything(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with the inputs as lists, which returns what the outputs hold, one after the other."""
    arguments = [
        [Slot(name, index) for index in indices(shape_of(drawn.dims, case))]
        for name, drawn in spec.inputs.items()
    ]
    named = spec.output if isinstance(spec.output, dict) else {None: str(spec.output)}
    places = [
        (*([] if name is None else [name]), *index)
        for name, dims in named.items()
        for index in indices(shape_of(dims, case))
    ]
    yield arguments, places


def between_levels(weights: list[Any], block_size: Any) -> list[Any]:
    """How far each share is from the borders between two levels."""
    levels = page.scalar("quantize_nf4").__globals__["LEVELS"]
    borders = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    blocks = [weights[start : start + block_size] for start in range(0, len(weights), block_size)]
    largest = [max(map(abs, block)) or 1 for block in blocks]
    shares = [w / scale for block, scale in zip(blocks, largest, strict=True) for w in block]
    return [share - border for share in shares for border in borders]


def blocks(name: str, rows: int, columns: int, size: int, dialect: str | None = None, **options: Any) -> Case:
    """A matrix cut into blocks of this size."""
    sizes = {"S": rows, "T": columns, "V": 16, "N": -(-rows * columns // size)}
    return Case(name, {"block_size": size}, dialect, sizes=sizes, **options)


BNB = "bitsandbytes, torchao"
QUANTIZE = Spec(
    "quantize_nf4",
    inputs={"weight": Drawn("ST", *NORMAL)},
    layout=everything,
    masked="",
    output={"codes": "ST", "scales": "N"},
    kinks=between_levels,
    cases=(
        blocks("one block of 64", 8, 8, 64, BNB),
        blocks("two blocks of 64", 4, 32, 64, BNB),
        blocks("a last block that is shorter", 7, 10, 64, BNB),
        blocks("less than a block", 3, 5, 64, BNB),
        blocks("blocks over rows", 5, 6, 4),
        blocks("an odd number of weights", 3, 7, 5),
        blocks("one weight a block", 2, 3, 1),
        blocks("small weights", 3, 8, 8, ranges={"weight": (-1e-5, 1e-5)}),
        blocks("weights of 1e4", 3, 8, 8, ranges={"weight": (-1e4, 1e4)}),
        blocks(
            "zeros, and a block of zeros",
            2,
            6,
            4,
            given={"weight": [[0.0, 1.25, -0.5, 0.0, 0.0, 0.0], [0.0, 0.0, -0.75, 0.0, 0.25, 0.5]]},
        ),
    ),
)
DEQUANTIZE = Spec(
    "dequantize_nf4",
    inputs={"codes": Drawn("ST", below="V"), "scales": Drawn("N", 0.05, 2.0)},
    layout=everything,
    masked="",
    output="ST",
    cases=(
        blocks("every code", 2, 8, 64, BNB, given={"codes": [list(range(8)), list(range(8, 16))]}),
        blocks("one block of 64", 8, 8, 64, BNB),
        blocks("two blocks of 64", 4, 32, 64, BNB),
        blocks("a last block that is shorter", 7, 10, 64, BNB),
        blocks("blocks over rows", 5, 6, 4),
        blocks("an odd number of weights", 3, 7, 5),
        blocks("one weight a block", 2, 3, 1),
        blocks("a scale of 0", 2, 4, 4, given={"scales": [0.0, 0.5]}),
        blocks("scales of 1e4", 3, 8, 8, ranges={"scales": (1e3, 1e4)}),
    ),
)


def between_codes(scales: list[Any], block_size: Any) -> list[Any]:
    """How far each scale is from halfway between two codes."""
    mean, distances = sum(scales) / len(scales), []
    for start in range(0, len(scales), block_size):
        block = [s - mean for s in scales[start : start + block_size]]
        second = max(map(abs, block)) or 1
        distances += [(127 * s / second + 127) % 1 - 0.5 for s in block]
    return distances


def eight(name: str, count: int, size: int, **options: Any) -> Case:
    """So many scales cut into blocks of this size."""
    return Case(name, {"block_size": size}, sizes={"N": count, "K": -(-count // size)}, **options)


SCALES = Spec(
    "quantize_scales",
    inputs={"scales": Drawn("N", 0.05, 2.0)},
    layout=everything,
    masked="",
    output={"codes": "N", "seconds": "K", "mean": ""},
    kinks=between_codes,
    cases=(
        eight("less than a block", 7, 256),
        eight("one block", 16, 16),
        eight("three blocks", 12, 4),
        eight("a last block that is shorter", 11, 4),
        eight("two scales a block", 6, 2),
        eight("one scale a block", 3, 1),
        eight("a single scale", 1, 256, given={"scales": [0.375]}),
        eight("equal scales", 4, 3, given={"scales": [0.25] * 4}),
        eight("small scales", 9, 4, ranges={"scales": (1e-6, 1e-5)}),
        eight("a scale of 0", 5, 3, given={"scales": [0.0, 0.3, 0.9, 0.6, 0.45]}),
    ),
)


# ---- routing


def lookup(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with the table as a dict; in the file it is a list of (tenant, version, adapter)."""
    table = {(tenant, version): adapter for tenant, version, adapter in inputs["table"]}
    yield [table, case.arguments["tenant"], case.arguments["version"]], [()]


THREE = [["bank_A", "policy_v3", 17], ["retail_B", "policy_v2", 42], ["saas_C", "policy_v1", 9]]
VERSIONS = [["bank_A", "policy_v3", 17], ["bank_A", "policy_v4", 18], ["bank_B", "policy_v3", 3]]


def request(name: str, tenant: str, version: str, table: list[list[Any]]) -> Case:
    return Case(name, {"tenant": tenant, "version": version}, given={"table": table})


ROUTE = Spec(
    "route",
    inputs={"table": Drawn("")},
    layout=lookup,
    for_layout=("tenant", "version"),
    masked="",
    cases=(
        request("bank_A", "bank_A", "policy_v3", THREE),
        request("retail_B", "retail_B", "policy_v2", THREE),
        request("saas_C", "saas_C", "policy_v1", THREE),
        request("two versions of a tenant: the old one", "bank_A", "policy_v3", VERSIONS),
        request("two versions of a tenant: the new one", "bank_A", "policy_v4", VERSIONS),
        request("two tenants of a version", "bank_B", "policy_v3", VERSIONS),
        request("adapter 0", "bank_A", "policy_v3", [["bank_A", "policy_v3", 0], *VERSIONS[1:]]),
        request(
            "two tenants share an adapter", "retail_B", "v1", [["bank_A", "v1", 5], ["retail_B", "v1", 5]]
        ),
        request(
            "names that nearly match",
            "bank",
            "v1",
            [["bank_A", "v1", 1], ["bank", "v1", 2], ["Bank", "v1", 3]],
        ),
        request(
            "letters beyond ASCII",
            "Größe & Söhne",
            "v1",
            [["Grosse & Soehne", "v1", 1], ["Größe & Söhne", "v1", 2]],
        ),
    ),
)

SPECS = (WEIGHT, FORWARD, MIXED, QUANTIZE, DEQUANTIZE, SCALES, ROUTE)
