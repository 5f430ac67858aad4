"""Each family in turn."""

import pytest
from tests.transformers.families.cases import Case

from moe_replay.testing.moe_families import MOE_FAMILIES


@pytest.fixture(params=MOE_FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """Return each family in turn."""
    return Case(request.param)
