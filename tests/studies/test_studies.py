"""Every study runs at the smoke budget, where it judges nothing."""

import json

import pytest

from steersman import catalog
from steersman.errors import InputError, InputTypeError
from steersman.studies import Study, run_study


@pytest.mark.parametrize("slug", [system.slug for system in catalog.systems()])
def test_smoke(slug, tmp_path):
    report = run_study(slug, budget="smoke", seed=1, folder=tmp_path)
    assert (report.slug, report.budget, report.seed) == (slug, "smoke", 1)
    assert report.claims
    assert all(claim.holds is None for claim in report.claims)
    assert report.holds
    assert report.table
    assert len({tuple(row) for row in report.table}) == 1, "rows of one table have the same columns"
    assert report.figures
    for figure in report.figures:
        assert figure.read_bytes()[:4] == b"\x89PNG"
    json.dumps(report.to_json())


def test_a_claim_that_does_not_hold_is_reported(tmp_path):
    study = Study("ppo", "cpu", 0, tmp_path)
    study.claim("a", expected="1", measured="1", holds=True)
    assert study.report().holds
    study.claim("b", expected="1", measured="0", holds=False)
    assert not study.report().holds


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="budget is 'huge'"):
        Study("ppo", "huge", 0, tmp_path)
    with pytest.raises(InputError, match="seed is -1"):
        Study("ppo", "cpu", -1, tmp_path)
    with pytest.raises(InputTypeError, match="seed is True"):
        Study("ppo", "cpu", True, tmp_path)
    with pytest.raises(InputError, match="Unknown system"):
        run_study("nothing")
