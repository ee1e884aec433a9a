"""In half precision a fast road is tried against passes that round alike, and what doesn't fit is still found out."""

from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import growing
from mechlens.models.engine.edits import Edit, site_values, value_at
from mechlens.models.engine.growing import edited_alone, edited_logits, record, why_not_growing
from mechlens.models.engine.site_reader import same_site

IDS = (5, 60, 7, 90, 100, 33, 12)


@pytest.fixture(scope="module")
def half() -> Any:
    return bridge(tiny_hf(dtype=torch.bfloat16), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_an_edit_alone_is_the_edit_in_a_growing_batch(site: str, half: Any) -> None:
    value = value_at(site_values(half, IDS[::-1], site, (1,))[1], site, 4, 1 if site == "z" else None)
    edit = Edit(1, 4, value, head=1 if site == "z" else None)
    grown = edited_logits(half, record(half, IDS, 6, site, ()), site, [edit], 6)
    alone = edited_alone(half, IDS, site, edit, 6)
    torch.testing.assert_close(grown[1], alone, rtol=0.02, atol=0.02)
    assert float((grown[0] - alone).abs().max()) > 0.05


def test_another_places_values_are_found_out(half: Any) -> None:
    values = site_values(half, IDS, "resid_pre", (0, 1))
    noisy = values[1] + 0.05 * values[1].abs().max() * torch.randn_like(values[1])
    found = {name: bool(got == want) for name, (got, want) in (
        ("noise", same_site(noisy, values[1])), ("another block", same_site(values[0], values[1])),
    )}  # fmt: skip
    assert found == {"noise": True, "another block": False}


def test_an_edit_that_goes_elsewhere_is_found_out(half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = growing.put
    monkeypatch.setattr(growing, "put", lambda rows, edits, site, first=0: put(rows, edits, site, first and first + 1))
    assert "other numbers" in why_not_growing(half, "resid_pre")
