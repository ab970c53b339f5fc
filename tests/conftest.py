"""What all tests share: no network, and the folder of real data and models."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module is
os.environ["LORALAB_CACHE"] = tempfile.mkdtemp(prefix="loralab-tests-")  # never the user's; processes inherit it
atexit.register(shutil.rmtree, os.environ["LORALAB_CACHE"], ignore_errors=True)

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: LORALAB_TEST_DATA, else ../shared/data beside the repository.

    Without it the test skips; under CI=true it fails, so that a green run has tested everything.
    """
    folder = Path(os.environ.get("LORALAB_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if folder.is_dir():
        return folder
    message = f"There is no data folder {folder}. Set LORALAB_TEST_DATA to it."
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def workshop(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See workshop.py."""
    from workshop import furnish

    return furnish(tmp_path_factory.mktemp("workshop"), data_folder)
