import importlib

import pytest

import steersman
from steersman import catalog
from steersman.errors import InputError
from steersman.training import Algorithm


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda s: s.slug)
def test_every_entry_leads_somewhere(system):
    assert issubclass(system.load(), Algorithm)
    assert callable(importlib.import_module(system.study).run)
    assert system.bibtex.startswith("@")
    assert str(system.year) in system.bibtex
    assert system.family.split("/")[0] == system.entry_point.split(".")[1]


def test_cite_and_systems_are_at_the_front_door():
    assert steersman.cite("spo") == catalog.get("spo").bibtex
    assert [s.slug for s in steersman.systems("rl")] == [s.slug for s in catalog.systems()]
    with pytest.raises(InputError, match="needs at least one"):
        steersman.cite()
