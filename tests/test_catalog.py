import importlib

import pytest

import steersman
from steersman import catalog
from steersman.errors import InputError
from steersman.policies import Policy
from steersman.training import Algorithm


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda s: s.slug)
def test_every_entry_leads_somewhere(system):
    entry = system.load()
    # Learners are algorithms; what combines or speeds up policies is a policy, or a function that makes one; a
    # controller's program gives a policy; stages of several algorithms are run.
    leads = isinstance(entry, type) and issubclass(entry, (Algorithm, Policy))
    leads = leads or callable(getattr(entry, "policy", None)) or callable(getattr(entry, "run", None))
    assert leads or (callable(entry) and not isinstance(entry, type))
    assert callable(importlib.import_module(system.study).run)
    assert system.bibtex.startswith("@")
    assert str(system.year) in system.bibtex
    assert system.family.split("/")[0] == system.entry_point.split(".")[1]


def test_cite_and_systems_are_at_the_front_door():
    assert steersman.cite("spo") == catalog.get("spo").bibtex
    learners = [s.slug for s in steersman.systems("rl")]
    assert "spo" in learners
    assert learners == [s.slug for s in catalog.systems() if s.family.startswith("rl")]
    with pytest.raises(InputError, match="needs at least one"):
        steersman.cite()
