"""Every plug point has its test file, and that file calls every form of it through the door."""

from __future__ import annotations

from pathlib import Path

import pytest
from hooks_exercised import COLLECTED, EXERCISED

from miles.hooks import CATALOG

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", CATALOG)
def test_each_plug_point_has_its_file(name: str) -> None:
    assert (HERE / f"test_{name}.py").is_file(), f"tests/hooks/test_{name}.py is missing"


@pytest.mark.parametrize("name", CATALOG)
def test_each_form_is_exercised(name: str, request: pytest.FixtureRequest) -> None:
    """Asked after all other tests of the session; told only where the whole file was part of it."""
    file = f"test_{name}"
    ran = sum(item.path.stem == file for item in request.session.items)
    chosen = any("::" in word for word in request.config.args)
    if chosen or ran == 0 or ran < request.config.stash[COLLECTED][file]:
        pytest.skip(f"only a part of tests/hooks/{file}.py is in this session")
    missing = [form.name for form in CATALOG[name].forms if (file, name, form.name) not in EXERCISED]
    assert not missing, f"tests/hooks/{file}.py calls no plug-in of form {', '.join(missing)}"
