"""An update is a few launches beside its passes, and no wait."""

import pytest
from launches import LIMITS, beside_the_passes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["60m", "1b"])
@pytest.mark.parametrize("name", LIMITS)
def test_an_update_is_a_few_launches_and_no_wait(name, model):
    settings, *limits = LIMITS[name]
    launches, waits = beside_the_passes(model, settings)
    assert launches <= limits[("60m", "1b").index(model)]
    # An update that switches looks once whether it takes place, and takes what it switches to the host.
    assert waits <= (2 if name == "switchlora" else 0)
