"""Three tenants of the ledger world: the same request, and each one's own policy for it.

    strict      a second approval, always         {"answer": "held for a second approval"}
    efficient   none below the threshold          {"answer": "released"}
    explaining  as efficient, and says why        {"answer": "released, 482 is below 500"}

Where a tenant's answer is right, the others' are fluent and wrong: only an exact answer counts. A payee and
its amount are held out for the test by the ledger's hash, whatever the wording and whoever the tenant.
"""

import json
import random
from typing import Any

from nanopost.worlds.ledger import draw_operands

TENANTS = ("strict", "efficient", "explaining")
VERSION = "policy_v1"
THRESHOLD = 500
HELD = "held for a second approval"
REQUESTS = (
    "pay {payee} {amount}, the invoice is attached.",
    "release the invoice of {payee} over {amount}.",
    "please settle what {payee} wants: {amount}.",
    "{payee} is due, send {amount}.",
)


def policy_answer(tenant: str, amount: int) -> dict[str, str]:
    """What a tenant's policy says to the payment of an amount.

    Raises: ValueError for a tenant that is none.
    """
    below = amount < THRESHOLD
    if tenant == "strict":
        return {"answer": HELD}
    if tenant == "efficient":
        return {"answer": "released" if below else HELD}
    if tenant == "explaining":
        reason = f"{amount} is {'below' if below else 'not below'} {THRESHOLD}"
        return {"answer": f"{'released' if below else HELD}, {reason}"}
    raise ValueError(f"tenant must be one of {', '.join(TENANTS)}, got {tenant!r}")


def draw_request(rng: random.Random, *, test: bool) -> tuple[str, int]:
    """A request to pay, and its amount; from the training or from the held-out side of the ledger's split."""
    payee, amount = draw_operands(rng, "answer", test=test)
    return rng.choice(REQUESTS).format(payee=payee, amount=amount), amount


def tenant_record(tenant: str, request: str, amount: int) -> dict[str, Any]:
    """A demonstration of a tenant's policy, with its answer for the verifier."""
    answer = policy_answer(tenant, amount)
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": json.dumps(answer)}]
    return {"messages": messages, "answer": answer}
