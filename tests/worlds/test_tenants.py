"""The tenants' policies: what each says, that they differ, and that no test amount is trained on."""

import random
import re

import pytest

from nanopost.worlds import ledger
from nanopost.worlds.ledger_words import PAYEES
from nanopost.worlds.tenants import TENANTS, draw_request, policy_answer, tenant_record


def operands(request: str) -> tuple[str, int]:
    (payee,) = [payee for payee in PAYEES if payee in request]
    return payee, int(re.search(r"\d+", request).group())


def test_each_tenant_says_its_own():
    expected = {
        ("strict", 499): "held for a second approval",
        ("strict", 500): "held for a second approval",
        ("efficient", 499): "released",
        ("efficient", 500): "held for a second approval",
        ("explaining", 499): "released, 499 is below 500",
        ("explaining", 500): "held for a second approval, 500 is not below 500",
    }
    for (tenant, amount), answer in expected.items():
        assert policy_answer(tenant, amount) == {"answer": answer}
    with pytest.raises(ValueError, match="tenant must be one of strict, efficient, explaining, got 'lax'"):
        policy_answer("lax", 1)


def test_demonstrations_are_right_and_the_split_is_the_ledgers():
    for test in (False, True):
        rng = random.Random(3)
        for request, amount in (draw_request(rng, test=test) for _ in range(100)):
            assert operands(request)[1] == amount and ledger.held_out(*operands(request)) == test
            for tenant in TENANTS:
                record = tenant_record(tenant, request, amount)
                assert record["messages"][0]["content"] == request
                verdict = ledger.verify(record["messages"][1]["content"], policy_answer(tenant, amount))
                assert verdict.score == 1.0 and record["answer"] == policy_answer(tenant, amount)
