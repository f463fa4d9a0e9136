"""Every case of golden/more_methods.*, and of other files of its format there, by the optimizers of the library."""

import pytest
import torch
from golden_cases import CASES, GOLDEN, beyond_rounding, check, given_of

from peft_pretraining import optim
from peft_pretraining.methods import METHODS


def renamed(settings, **names):
    """Settings under the names that the library has for them."""
    return {names.get(name, name): value for name, value in settings.items()}


def projecting(kind):
    """Of methods with a basis and a limit on the growth of their steps."""

    def build(weight, settings, given):
        own = {"projections": given} if given else {}
        return kind([weight], **renamed(settings, gap="update_proj_gap", gamma="norm_growth"), **own)

    return build


BUILD = {
    "apollo": lambda *case: projecting(optim.Apollo)(*case),
    "muon": lambda weight, settings, _: optim.Muon([weight], **renamed(settings, eps="ns_eps")),
    "rmnp": lambda weight, settings, _: optim.RMNP([weight], **renamed(settings, eps="row_eps")),
    "scale": lambda weight, settings, _: optim.Scale([weight], **renamed(settings, eps="norm_eps")),
    "adam_mini": lambda weight, settings, _: optim.AdamMini([weight], **settings),
    "soap": lambda weight, settings, given: optim.SOAP([weight], first_vectors=given, **settings),
    "stable_spam": lambda weight, settings, _: optim.StableSPAM([weight], **settings),
    "foam": lambda weight, settings, _: optim.Foam([weight], **settings),
    "fira": lambda *case: projecting(optim.Fira)(*case),
    "racs": lambda weight, settings, _: optim.Racs([weight], **renamed(settings, gamma="norm_growth")),
    "alice": lambda weight, settings, given: optim.Alice(
        [weight],
        bases=given,
        **renamed(settings, gap="update_proj_gap", gamma="norm_growth", residual_scale="compensation"),
    ),
    "ldadam": lambda weight, settings, _: optim.LDAdam([weight], **settings),
    "frugal": lambda weight, settings, given: optim.Frugal(
        [weight], indices=given, **renamed(settings, gap="update_proj_gap")
    ),
}
"""Method of a case -> the optimizer of a weight, the case's settings, and what it prescribes."""


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_papers(name):
    method = CASES[name]["method"]
    if method not in BUILD and method not in METHODS:
        pytest.skip(f"{method} is not among the methods")
    check(name, lambda weight, settings: BUILD[method](weight, settings, given_of(name)))


BEYOND = ("foam_wide", "foam_tall_padded", "foam_square_of_mean", "racs_wide_zero_row", "normuon_tall")
"""Cases in which float32 is off by more than 2e-6 of the movement."""


@pytest.mark.parametrize("name", BEYOND)
def test_float32_loses_little_but_the_rounding_of_weights(name):
    method = CASES[name]["method"]
    found, floor = beyond_rounding(name, lambda weight, settings: BUILD[method](weight, settings, given_of(name)))
    assert found <= 1.5 * floor, (found, floor)


def test_a_case_can_be_checked_twice():
    """Training leaves the first weights, which all tests read, as they are."""
    for name in ("scale_head", "scale_embedding"):
        before = GOLDEN[f"{name}/W0"].clone()
        check(name, lambda weight, settings, name=name: BUILD["scale"](weight, settings, given_of(name)))
        assert torch.equal(GOLDEN[f"{name}/W0"], before)


def test_other_files_of_the_format_are_read():
    assert len(CASES) >= 54 and {"muon_tall", "adam_mini_heads"} <= CASES.keys()
