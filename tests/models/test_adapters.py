"""Many adapters, one batch: every row is alone, and no tenant gets another one's policy."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.models.adapters import mixed_lora_forward, route
from nanopost.models.lora import lora_forward
from tests.pages import scalar
from tests.ragged import normal
from tests.tolerances import within

seeds = st.integers(0, 2**31)
# rows, tokens, out, in, r, adapters
sizes = st.tuples(*(st.integers(1, high) for high in (5, 4, 5, 6, 3, 4)))


def drawn(seed: int, rows: int, tokens: int, out: int, width: int, rank: int, bank: int) -> list[Tensor]:
    """x (B, T, in), W, the banks, and an adapter a row."""
    generator = Generator().manual_seed(seed)
    shapes = (rows, tokens, width), (out, width), (bank, rank, width), (bank, out, rank)
    return [*(normal(generator, *s) for s in shapes), torch.randint(bank, (rows,), generator=generator)]


@given(size=sizes, seed=seeds, alpha=st.floats(0.1, 40.0), stable=st.booleans())
def test_MX1_value_equals_the_page(size: tuple[int, ...], seed: int, alpha: float, stable: bool) -> None:
    inputs = drawn(seed, *size)
    hidden, *bank, adapter = (tensor.tolist() for tensor in inputs)
    found = mixed_lora_forward(*inputs, alpha=alpha, rank_stabilised=stable)
    for t in range(size[1]):
        page = scalar("mixed_lora_forward")([row[t] for row in hidden], *bank, adapter, alpha, stable)
        expected = torch.tensor(page, dtype=torch.float64)
        torch.testing.assert_close(found[:, t], expected, rtol=1e-9, atol=1e-9)
        one = mixed_lora_forward(inputs[0][:, t], *inputs[1:], alpha=alpha, rank_stabilised=stable)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(5, 1, 7, 6, 2, 4), (5, 3, 48, 64, 8, 4), (9, 7, 257, 129, 16, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_MX2_a_row_is_the_row_alone(size: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, weight, lora_A, lora_B, adapter = drawn(1, *size)
    hidden, weight, lora_A, lora_B = (t.to(dtype) for t in (hidden, weight, lora_A, lora_B))
    found = mixed_lora_forward(hidden, weight, lora_A, lora_B, adapter, alpha=3.0)
    for b, i in enumerate(adapter.tolist()):
        alone = mixed_lora_forward(hidden[b : b + 1], weight, lora_A, lora_B, adapter[b : b + 1], alpha=3.0)
        assert torch.equal(found[b : b + 1], alone)
        if dtype == torch.float64:
            beside = lora_forward(hidden[b], weight, lora_A[i], lora_B[i], alpha=3.0)
            within("adapters, float64", found[b], beside)


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_MX3_a_broken_adapter_or_row_stays_alone(junk: float, place: int) -> None:
    inputs = drawn(2, 6, 3, 5, 4, 2, 3)
    inputs[4] = torch.tensor([0, 1, 2, 1, 0, 2])
    clean = mixed_lora_forward(*inputs, alpha=3.0)
    inputs[place] = inputs[place].clone()
    inputs[place][1] = junk  # the row 1, or the adapter 1 of rows 1 and 3
    found = mixed_lora_forward(*inputs, alpha=3.0)
    others = torch.tensor([0, 2, 4, 5])
    assert torch.equal(found[others], clean[others])
    assert not torch.equal(found[1], clean[1])


@pytest.mark.parametrize("tenant", range(4))
def test_MX4_the_gradient_reaches_the_own_adapter_alone(tenant: int) -> None:
    inputs = drawn(3, 6, 3, 5, 4, 2, 4)
    inputs[4] = torch.tensor([0, 1, 2, 1, 0, 2])
    banks = inputs[2:4] = [bank.requires_grad_() for bank in inputs[2:4]]
    rows = inputs[4] == tenant
    found = mixed_lora_forward(*inputs, alpha=3.0)[rows].square().sum()
    for gradient in torch.autograd.grad(found, banks):
        reached = gradient.flatten(1).any(dim=1)
        assert reached.tolist() == [i == tenant and bool(rows.any()) for i in range(4)]


def test_MX4_a_broken_tenant_breaks_no_other_gradient() -> None:
    inputs = drawn(4, 4, 3, 5, 4, 2, 3)
    inputs[4] = torch.tensor([0, 1, 2, 1])

    def gradients(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        banks = [bank.clone().requires_grad_() for bank in tensors[2:4]]
        found = mixed_lora_forward(tensors[0], tensors[1], *banks, tensors[4], alpha=3.0)
        return torch.autograd.grad(found.square().sum(), banks)

    clean = gradients(inputs)
    inputs[2] = inputs[2].clone()
    inputs[2][1] = math.nan
    for found, expected in zip(gradients(inputs), clean, strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().any()


@given(size=sizes, seed=seeds)
def test_MX5_order_and_a_single_adapter(size: tuple[int, ...], seed: int) -> None:
    hidden, weight, lora_A, lora_B, adapter = drawn(seed, *size)
    found = mixed_lora_forward(hidden, weight, lora_A, lora_B, adapter, alpha=0.7)
    order = torch.randperm(len(hidden), generator=Generator().manual_seed(seed))
    turned = mixed_lora_forward(hidden[order], weight, lora_A, lora_B, adapter[order], alpha=0.7)
    assert torch.equal(turned, found[order])
    for i in range(len(lora_A)):
        same = mixed_lora_forward(hidden, weight, lora_A, lora_B, torch.full_like(adapter, i), alpha=0.7)
        expected = lora_forward(hidden, weight, lora_A[i], lora_B[i], alpha=0.7)
        within("adapters, float64", same, expected)


@pytest.mark.parametrize("stable", [False, True])
def test_MX6_gradcheck(stable: bool) -> None:
    *leaves, _ = drawn(5, 4, 2, 3, 5, 2, 3)
    adapter = torch.tensor([2, 0, 2, 2])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        lambda *t: mixed_lora_forward(*t, adapter, alpha=1.7, rank_stabilised=stable), tuple(leaves)
    )


def test_MX6_factors_wider_than_the_base() -> None:
    hidden, weight, lora_A, lora_B, adapter = drawn(6, 3, 2, 5, 4, 2, 3)
    half = hidden.bfloat16(), weight.bfloat16()
    found = mixed_lora_forward(*half, lora_A.float(), lora_B.float(), adapter, alpha=1.7)
    assert found.dtype == torch.bfloat16
    expected = mixed_lora_forward(*(t.double() for t in half), lora_A, lora_B, adapter, alpha=1.7)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (4, torch.tensor([0, 3]), r"adapter of row 1 must lie in \[0, 3\), got 3"),
        (4, torch.tensor([-1, 0]), r"adapter of row 0 must lie in \[0, 3\), got -1"),
        (4, torch.tensor([0]), r"adapter must be \(2,\), a whole number a row of hidden, got \(1,\)"),
        (4, torch.tensor([0.0, 1.0]), r"adapter must be \(2,\).*torch.float32"),
        (4, torch.tensor([True, False]), r"adapter must be \(2,\).*torch.bool"),
        (2, torch.zeros(2, 2, 5), r"lora_A must be \(N, r, in\) and lora_B \(N, out, r\) with one N ≥ 1"),
        (2, torch.zeros(2, 5), r"lora_A must be \(N, r, in\)"),
        (3, torch.zeros(3, 4, 3), r"weight must be \(out, in\).*lora_B \(4, 3\)"),
        (0, torch.zeros(2, 6, 4), r"hidden must be \(..., 5\)"),
        (0, torch.zeros(5), r"hidden must be \(B, in\) or \(B, T, in\), got \(5,\)"),
    ],
)
def test_MX7_what_does_not_fit_is_refused(place: int, wrong: Tensor, message: str) -> None:
    good = [torch.zeros(2, 6, 5), torch.zeros(4, 5), torch.zeros(3, 2, 5), torch.zeros(3, 4, 2)]
    inputs = [*good, torch.tensor([0, 2])]
    inputs[place] = wrong
    with pytest.raises(ValueError, match=message):
        mixed_lora_forward(*inputs, alpha=1.0)


# ---- route

TABLE = {("bank_A", "policy_v3"): 17, ("retail_B", "policy_v2"): 42, ("saas_C", "policy_v1"): 9}
names = st.sampled_from(["bank_A", "retail_B", "saas_C", "", "A"])
tables = st.dictionaries(st.tuples(names, names), st.integers(0, 99))


@given(table=tables, tenant=names, version=names)
def test_RT1_value_equals_the_page(table: dict[tuple[str, str], int], tenant: str, version: str) -> None:
    try:
        expected = scalar("route")(table, tenant, version)
    except ValueError:
        with pytest.raises(ValueError, match="no adapter for tenant"):
            route(table, tenant, version)
    else:
        assert route(table, tenant, version) == expected == table[tenant, version]


@pytest.mark.parametrize(("key", "adapter"), TABLE.items())
def test_RT2_the_worked_values(key: tuple[str, str], adapter: int) -> None:
    assert route(TABLE, *key) == adapter
    assert route(TABLE, "bank_A", "policy_v3") == 17


@pytest.mark.parametrize(
    ("tenant", "version", "message"),
    [
        ("bank_A", "policy_v4", "no adapter for tenant 'bank_A' and version 'policy_v4': it has 'policy_v3'"),
        ("bank_A", "policy_v2", "no adapter for tenant 'bank_A' and version 'policy_v2': it has 'policy_v3'"),
        (
            "bank_D",
            "policy_v3",
            "no adapter for tenant 'bank_D' and version 'policy_v3': the tenant is unknown",
        ),
        ("", "", "no adapter for tenant '' and version '': the tenant is unknown"),
    ],
)
def test_RT3_what_is_unknown_is_refused_by_both_names(tenant: str, version: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        route(TABLE, tenant, version)


def test_RT3_adapter_0_is_an_adapter() -> None:
    assert route({("bank_A", "policy_v3"): 0}, "bank_A", "policy_v3") == 0


@pytest.mark.parametrize(
    ("tenant", "version"),
    [
        *(("BANK_A", "policy_v3"), (" bank_A", "policy_v3"), ("bank_A", "policy_v3 ")),
        *(("bank", "policy_v3"), ("bank_A", "policy_v"), ("policy_v3", "bank_A")),
    ],
)
def test_RT4_only_equal_texts_match(tenant: str, version: str) -> None:
    with pytest.raises(ValueError, match="no adapter for tenant"):
        route(TABLE, tenant, version)


def test_RT5_the_table_stays_and_its_order_does_not_matter() -> None:
    for order in itertools.permutations(TABLE.items()):
        table = dict(order)
        assert [route(table, *key) for key in TABLE] == list(TABLE.values())
        with pytest.raises(ValueError, match="bank_D"):
            route(table, "bank_D", "policy_v3")
        assert table == TABLE and list(table) == [key for key, _ in order]
