"""The app over the embedded model, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from openwu.editor.editor import Editor
from openwu.serving.app import create_app
from openwu.serving.engines.local import LocalEngine


@pytest.fixture(scope="session")
def editor() -> Editor:
    return Editor.from_pretrained()


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    app = create_app(LocalEngine(Editor.from_pretrained))
    with TestClient(app, base_url="http://localhost") as client:
        yield client
