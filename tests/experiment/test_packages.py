"""Files of installed packages are found, and nothing is imported for it."""

import sys

from experiment.packages import in_package


def test_a_file_of_a_package_is_found_and_the_package_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "a_package_of_weights"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert in_package("a_package_of_weights/model") == folder / "model"
    assert in_package("a_package_of_weights/other") is None
    assert "a_package_of_weights" not in sys.modules


def test_what_is_no_package_has_no_files():
    for path in ("no_such_package/model", "sentence-transformers/all-MiniLM-L6-v2", "sys/model", "", "/"):
        assert in_package(path) is None
