"""The drawings of tests/drawings.py, for the importer and the command line."""

from pathlib import Path

import pytest

from tests.drawings import write_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))
