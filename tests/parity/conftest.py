"""These tests need the parity extra; where it is not installed they are left out, not failed."""

import importlib.util

from tests.conftest import ORACLE_PACKAGES

MISSING = [name for name in ORACLE_PACKAGES if importlib.util.find_spec(name) is None]

collect_ignore_glob = ["test_*.py"] if MISSING else []
