"""An API key among arguments that are logged and pickled."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

from fp8ctl.engines.hooks.secret import Secret


def test_a_key_is_itself_and_does_not_show_itself() -> None:
    """SGLang logs its arguments as a dataclass, and pickles them for its children."""
    arguments = SimpleNamespace(api_key=Secret("hunter2"))
    assert "hunter2" not in repr(arguments) + repr([arguments.api_key])
    assert arguments.api_key == "hunter2"
    assert f"Bearer {arguments.api_key}" == "Bearer hunter2"
    copy = pickle.loads(pickle.dumps(arguments)).api_key
    assert (copy, repr(copy)) == ("hunter2", "'***'")
