"""What every test shares: one thread, one hypothesis profile, the folder of outside data if there is one."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)

EXAMPLES = 50 * int(os.environ.get("NANOPOST_EXAMPLES", "1"))  # make test-deep: a hundred times as many

settings.register_profile("nanopost", deadline=None, derandomize=True, max_examples=EXAMPLES, database=None)
settings.register_profile("mutant", settings.get_profile("nanopost"), phases=(Phase.explicit, Phase.generate))
# Under a mutant (see tests/test_mutants.py) a failure is the aim: no time goes into shrinking its example.
settings.load_profile("mutant" if "NANOPOST_MUTANT" in os.environ else "nanopost")


@pytest.fixture
def shared() -> Path:
    """The folder of data sets that NANOPOST_SHARED points at; the test is skipped where there is none."""
    if "NANOPOST_SHARED" not in os.environ:
        pytest.skip("NANOPOST_SHARED is not set: this test needs the public data sets")
    return Path(os.environ["NANOPOST_SHARED"])
