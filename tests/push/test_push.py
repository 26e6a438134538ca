"""The package costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fp8ctl import push


def test_its_name_is_there_and_nothing_is_imported_for_it() -> None:
    script = (
        "import sys, fp8ctl.push; assert 'Rollout' in fp8ctl.push.__all__;"
        " assert not {'torch', 'numpy', 'http.client'} & set(sys.modules);"
        " from fp8ctl.push import Progress, Update; assert 'torch' not in sys.modules;"
        " from fp8ctl.push import Rollout; assert 'torch' in sys.modules;"
        " assert Rollout.__module__ == 'fp8ctl.push.rollout'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_name_that_it_does_not_have_is_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Rollin'"):
        _ = push.Rollin
