"""The documents against the program, in both directions: nothing missing, nothing invented."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import typer

from fp8ctl import cli, diagnosis, errors, gate, snippets
from fp8ctl.check.verdict import VERDICTS
from fp8ctl.errors import Fp8ctlError
from fp8ctl.patching import catalog, status

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
CHECK = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
LOGPROBS = (ROOT / "docs" / "logprobs.md").read_text(encoding="utf-8")
QUANTIZATION = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
TRAINERS = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
PAGES = {
    "README.md": README,
    "docs/design.md": DESIGN,
    "docs/check.md": CHECK,
    "docs/commands.md": COMMANDS,
    "docs/library.md": LIBRARY,
    "docs/logprobs.md": LOGPROBS,
    "docs/quantization.md": QUANTIZATION,
    "docs/trainers.md": TRAINERS,
}
ALL = "\n".join(PAGES.values())

# The demo's transcript is output, not a claim about options.
PROSE = re.sub(r"<!-- transcript: demo -->.*?<!-- /transcript -->", "", ALL, flags=re.S)

PROGRAM: Any = typer.main.get_command(cli.build())
NAMES = tuple(PROGRAM.commands)

SOURCES = sorted(
    path
    for folder in ("fp8ctl", "kernels", "patches", "tests")
    for pattern in ("*.py", "*.patch", "*.toml")
    for path in (ROOT / folder).rglob(pattern)
    if path != Path(__file__).resolve()
)


def options(command: Any) -> set[str]:
    """Return every spelling of every option of a command."""
    return {
        word
        for parameter in command.params
        if parameter.param_type_name == "option"
        for word in (*parameter.opts, *parameter.secondary_opts)
    }


def section(name: str) -> str:
    """Return the part of commands.md about one command."""
    found = re.search(rf"^## fp8ctl {name}\n(.*?)(?=^## |\Z)", COMMANDS, re.M | re.S)
    assert found, f"docs/commands.md has no section for {name}"
    return found[1]


def code_of(text: str) -> str:
    """Return what stands in code spans and code blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    .*$", rest, re.M)
    spans = re.findall(r"`([^`\n]+)`", rest)
    return "\n".join([*fenced, *indented, *spans])


def rows(text: str, head: str) -> dict[str, list[str]]:
    """Return a Markdown table by its first heading: first cell to the other cells."""
    found = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-| ]+\|\n((?:\|.*\n?)+)", text, re.M)
    assert found, f"no table that begins with {head}"
    result = {}
    for line in found[1].splitlines():
        first, *others = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        result[first] = others
    return result


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def error_classes(root: type[Fp8ctlError] = Fp8ctlError) -> Iterator[type[Fp8ctlError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from error_classes(child)


def literals(*paths: Path) -> set[str]:
    """Return every string constant of some Python files."""
    return {
        node.value
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


# --- commands and options -------------------------------------------------------------------------


def test_the_contract_has_these_commands() -> None:
    wanted = "doctor install plan patch revert quantize launch check push push-log"
    wanted += " ps logs stop bench demo"
    assert list(NAMES) == wanted.split()


def test_every_command_has_one_section_and_no_section_is_about_another() -> None:
    assert sorted(re.findall(r"^## fp8ctl (\S+)$", COMMANDS, re.M)) == sorted(NAMES)


def test_the_readme_lists_every_command_with_the_words_of_its_help() -> None:
    table = {spans(first)[0]: cells for first, cells in rows(README, "Command").items()}
    assert table == {f"fp8ctl {n}": [c.help] for n, c in PROGRAM.commands.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_options_is_that_of_the_program(name: str) -> None:
    table = rows(section(name), "Option")
    documented = {span.split()[0] for first in table for span in spans(first)}
    assert documented == options(PROGRAM.commands[name]) - {"-h", "--help"}


@pytest.mark.parametrize("name", NAMES)
def test_the_usage_line_names_every_option_and_nothing_else(name: str) -> None:
    usage = section(name).partition("\n\n")[0]
    written = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", usage))
    if "TARGET" in usage:
        written |= {"--python", "--site-packages"}
    one_letter = {"--follow"} if "-f" in written else set()
    assert written | one_letter == options(PROGRAM.commands[name]) - {"-h", "--help"}


@pytest.mark.parametrize("name", NAMES)
def test_required_options_are_called_required(name: str) -> None:
    table = rows(section(name), "Option")
    said = {spans(first)[0].split()[0] for first, cells in table.items() if "required" in cells[0]}
    needed = {
        p.opts[0]
        for p in PROGRAM.commands[name].params
        if p.required and p.param_type_name == "option"
    }
    assert said == needed


@pytest.mark.parametrize("name", NAMES)
def test_documented_defaults_are_the_programs(name: str) -> None:
    parameters = {p.opts[0]: p for p in PROGRAM.commands[name].params}
    for first, cells in rows(section(name), "Option").items():
        option = spans(first)[0].split()[0]
        default = parameters[option].default
        said = re.search(r"default (\d[\d.]*)", cells[0])
        if said and default is not None:
            assert said[1] == str(default), option
        for word in re.findall(r"`([^`]+)` \(default\)", cells[0]):
            assert word == default, option


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_a_command_line_that_the_program_takes(name: str) -> None:
    examples = re.findall(r"^\$ fp8ctl (.+)$", section(name), re.M)
    assert examples
    for example in examples:
        first, *words = shlex.split(example)
        assert first == name
        PROGRAM.commands[name].make_context(name, words)  # raises what it would print


def test_the_parser_that_judges_examples_refuses_a_wrong_one() -> None:
    with pytest.raises(Exception, match="No such option"):
        PROGRAM.commands["patch"].make_context("patch", ["--backends", "sglang"])


def test_every_option_in_the_documents_exists() -> None:
    ours = set().union(*(options(c) for c in PROGRAM.commands.values())) | {"--version"}
    # An engine's, git's or pip's option is one that the program itself speaks of.
    foreign = " ".join(literals(*(ROOT / "fp8ctl").rglob("*.py")))
    invented = {
        word
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code_of(PROSE))
        if word not in ours and not re.search(rf"(?<![\w-]){word}(?![\w-])", foreign)
    }
    assert not invented


def test_every_subcommand_in_the_documents_exists() -> None:
    used = set(re.findall(r"\bfp8ctl ([a-z][a-z-]*)", code_of(PROSE)))
    assert used == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_json_and_help(name: str) -> None:
    assert "--json" in options(PROGRAM.commands[name])
    program = PROGRAM.make_context("fp8ctl", [], resilient_parsing=True)
    command = PROGRAM.commands[name]
    context = command.make_context(name, [], parent=program, resilient_parsing=True)
    assert set(command.get_help_option_names(context)) == {"-h", "--help"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("doctor", "--python --site-packages --strict"),
        ("install", "--device --dir"),
        ("plan", "--model --backend --mode --tp"),
        (
            "patch",
            "--python --site-packages --backend --patch --list --dry-run --print-diff "
            "--allow-drift --allow-running",
        ),
        ("revert", "--python --site-packages --backend --patch"),
        ("quantize", "--model --out --mode --block-size"),
        (
            "launch",
            "--backend --python --site-packages --model --mode --quantization --torchao-config "
            "--await-push --trace --host --port --tp --detach --wait --timeout --check --no-check "
            "--dry-run",
        ),
        ("check", "--model --level --record --against --report --watch"),
        ("push", "--model --via --version --delta --record --in-flight --bucket-size --no-check"),
        ("push-log", "--diff"),
        ("logs", "--rank -f"),
        ("stop", "--all"),
    ],
)
def test_the_contract_of_options_holds(name: str, wanted: str) -> None:
    assert set(wanted.split()) <= options(PROGRAM.commands[name])


def test_launch_listens_on_loopback_unless_told_otherwise() -> None:
    parameters = {p.opts[0]: p.default for p in PROGRAM.commands["launch"].params}
    assert parameters["--host"] == "127.0.0.1"
    assert (parameters["--check"], parameters["--no-check"]) == (None, False)


# --- exit codes and error ids ---------------------------------------------------------------------

CONTRACT = {
    "Fp8ctlError": 1,
    "CatalogError": 1,
    "CarrierError": 5,
    "UsageError": 2,
    "NotFoundError": 3,
    "CheckpointError": 3,
    "UnsupportedError": 4,
    "DriftError": 5,
    "HunkError": 5,
    "ConflictError": 5,
    "DiffError": 5,
    "NotPermittedError": 6,
    "BusyError": 7,
    "CheckFailedError": 8,
    "PlanDoesNotFitError": 8,
    "EngineFailedError": 9,
    "AbortedError": 130,
}


def test_exit_codes_are_the_contracts() -> None:
    assert {c.__name__: c.exit_code for c in error_classes()} == CONTRACT


def test_no_two_errors_share_an_id() -> None:
    ids = [c.id for c in error_classes()]
    assert len(set(ids)) == len(ids)


def test_the_table_of_error_ids_is_that_of_the_program() -> None:
    table = {spans(first)[0]: int(cells[0]) for first, cells in rows(COMMANDS, "Id").items()}
    assert table == {c.id: c.exit_code for c in error_classes()}


@pytest.mark.parametrize(
    ("page", "head"), [("docs/commands.md", "Code"), ("README.md", "Exit code")]
)
def test_the_tables_of_exit_codes_are_complete(page: str, head: str) -> None:
    codes = {int(first) for first in rows(PAGES[page], head)}
    assert codes == {0, *(c.exit_code for c in error_classes())}


def test_exit_codes_that_a_section_speaks_of_exist() -> None:
    known = {0, *(c.exit_code for c in error_classes())}
    for name in NAMES:
        said = re.findall(r"^Exits? (\d+)|[,;] (\d+) where", section(name), re.M)
        assert {int(a or b) for a, b in said} <= known, name


def test_every_id_in_the_documents_is_in_the_program() -> None:
    known = {c.id for c in error_classes()}
    for hook in (ROOT / "fp8ctl" / "engines" / "hooks").glob("*.py"):
        known |= {text for text in literals(hook) if text.startswith("FP8-")}
    assert set(re.findall(r"FP8-[A-Z][A-Z-]+", PROSE)) == known


# --- words that programs read ---------------------------------------------------------------------


def test_the_table_of_findings_is_that_of_doctors_rules() -> None:
    ids: set[str] = set()
    for module in ("rules.py", "host_rules.py"):
        tree = ast.parse((ROOT / "fp8ctl" / module).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                assert isinstance(node.args[0], ast.Constant), f"{module}:{node.lineno}"
                ids.add(node.args[0].value)  # type: ignore[arg-type]
    table = rows(section("doctor"), "Finding")
    assert {span for first in table for span in spans(first)} == ids


def test_the_table_of_patches_is_the_catalogues() -> None:
    text = section("patch")
    written = re.findall(r"^\| `([\w.-]+)` \| `([\w-]+)` \| (\w+) \|", text, re.M)
    known = [
        (series.name, patch.id, "any" if len(patch.devices) > 1 else patch.devices[0])
        for series in map(catalog.load_folder, catalog.folders())
        for patch in series.patches
    ]
    assert sorted(written) == sorted(known)


def test_the_changelog_names_every_patch() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for series in map(catalog.load_folder, catalog.folders()):
        [line] = re.findall(rf"Series `{re.escape(series.name)}`: (.+)", changelog)
        assert spans(line) == [patch.id for patch in series.patches]


def test_states_of_files_are_those_of_the_patcher() -> None:
    said = section("patch").partition("The state of a file is ")[2].partition("\n\n")[0]
    assert set(spans(said)) == set(get_args(status.State))


def test_the_table_of_causes_is_that_of_the_diagnosis() -> None:
    known = {row[0] for row in diagnosis._TABLE}
    for extra in (diagnosis.likeliest([], -9), diagnosis.likeliest([], 1)):
        known.add(extra.id)
    table = rows(section("launch"), "Cause")
    assert {span for first in table for span in spans(first)} == known


def test_the_table_of_verdicts_is_that_of_check() -> None:
    assert [spans(first)[0] for first in rows(section("check"), "Verdict")] == list(VERDICTS)


def test_the_table_of_snippets_is_that_of_the_program() -> None:
    table = rows(section("plan"), "Snippet")
    assert {span for first in table for span in spans(first)} == set(snippets.KINDS)


def test_the_states_of_ps_are_documented() -> None:
    table = rows(section("ps"), "State")
    written = {span for first in table for span in spans(first)}
    # What `server.running` adds to what a server says of itself.
    assert written == {*get_args(gate.State), "silent", "orphaned"}


def test_the_gates_states_are_documented() -> None:
    from fp8ctl.engines.hooks import gate as hook

    assert {spans(first)[0] for first in rows(DESIGN, "State")} == set(get_args(hook.State))


def test_every_environment_variable_is_documented_and_no_other() -> None:
    used = {
        name
        for path in SOURCES
        for name in re.findall(r"FP8CTL_[A-Z]+(?:_[A-Z]+)*", path.read_text(encoding="utf-8"))
    }
    documented = {spans(first)[0] for first in rows(COMMANDS, "Variable")}
    assert documented == used
    assert {spans(first)[0] for first in rows(README, "Variable")} <= documented


# --- the data of --json ---------------------------------------------------------------------------

MODULES = {
    "doctor": ["doctor.py", "findings.py"],
    "install": ["install.py"],
    "plan": ["manifest.py", "planning.py"],
    "patch": ["patching/commands.py", "patching/account.py"],
    "quantize": ["quantizing.py", "checkpoint.py"],
    "launch": ["launching.py", "supervisor.py"],
    "check": [
        *("check/code.py", "check/levels.py", "check/verdict.py", "check/weights.py"),
        *("check/tensors.py", "check/watch.py", "engines/hooks/loaded.py"),
        *("engines/hooks/report.py", "quality.py"),
    ],
    "push": ["pushing.py", "push/result.py"],
    "push-log": ["history.py", "engines/hooks/openpush.py"],
    "ps": ["server.py"],
    "logs": ["server.py"],
    "stop": ["server.py"],
    "bench": ["kernels/bench.py", "kernels/timing.py", "pushbench.py", "pushing.py"],
    "demo": ["demo.py"],
}


def documented_data(name: str) -> str:
    """Return the paragraph of a section that tells the keys of `data`."""
    found = re.search(r"^Data.*?:(.*?)\n\n", section(name), re.M | re.S)
    assert found, f"{name}: no paragraph `Data:`"
    return found[1]


def top_keys(name: str) -> set[str]:
    """Return the keys of `data` itself: those outside of parentheses, in the first sentence."""
    flat = re.sub(r"\([^()]*\)", "", documented_data(name))
    return set(spans(flat.split(". ")[0].split(";")[0]))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_documented_key_is_one_that_the_command_writes(name: str) -> None:
    known = literals(*(ROOT / "fp8ctl" / module for module in MODULES[name]))
    known |= {"--list", "--snippet", "--check", "--diff", "levels"}
    assert set(spans(documented_data(name))) <= known


def answer(*argv: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "fp8ctl", *argv, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["ok"] is (code == 0)
    assert document["command"] == argv[0]
    return document


def test_the_keys_of_ps_stop_and_install_are_the_documented_ones() -> None:
    assert set(answer("ps")["data"]) == top_keys("ps")
    assert set(answer("stop", "--all")["data"]) == top_keys("stop")
    data = answer("install", "sglang", "--device", "cpu", "--dry-run")["data"]
    assert set(data) == top_keys("install")


def test_an_error_document_has_the_documented_form(tmp_path: Path) -> None:
    document = answer("doctor", "--site-packages", str(tmp_path), code=3)
    assert set(document) == {"ok", "command", "error"}
    assert set(document["error"]) == {"id", "message", "hint", "data"}
    assert document["error"]["id"] == "FP8-NOT-FOUND"
    assert set(document["error"]["data"]) == top_keys("doctor")


def test_the_keys_of_a_failed_check_are_the_documented_ones() -> None:
    # Port 1 answers nobody.
    document = answer("check", "http://127.0.0.1:1", code=8)
    assert set(document["error"]["data"]) == top_keys("check")
    assert document["error"]["data"]["verdict"] == "unreachable"


def test_the_keys_of_plan_are_the_documented_ones(tmp_path: Path) -> None:
    header = {
        "model.layers.0.mlp.up_proj.weight": {
            "dtype": "BF16",
            "shape": [128, 128],
            "data_offsets": [0, 2 * 128 * 128],
        }
    }
    text = json.dumps(header).encode()
    weights = len(text).to_bytes(8, "little") + text + bytes(2 * 128 * 128)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    data = answer("plan", "--model", str(tmp_path), "--backend", "sglang")["data"]
    assert set(data) == top_keys("plan")


def test_a_command_line_that_cannot_be_parsed_is_an_error_like_any_other() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fp8ctl", "plan", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert (error["id"], error["hint"]) == ("FP8-USAGE", "fp8ctl plan --help")
    assert "--model" in error["message"]


def test_the_envelopes_in_the_documents_are_json() -> None:
    shown = re.findall(r"^```json\n(.*?)^```", COMMANDS, re.M | re.S)
    assert [json.loads(text)["ok"] for text in shown] == [True, False]


# --- the pages themselves -------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_inside_the_project_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith(("https://", "http://")):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert fragment in map(anchor, headings), target


def test_headings_that_the_code_refers_to_exist() -> None:
    headings = set(re.findall(r"^## (.+)$", DESIGN, re.M))
    files = [*SOURCES, ROOT / "pyproject.toml"]
    texts = [path.read_text(encoding="utf-8") for path in files]
    named = {name for text in texts for name in re.findall(r'docs/design\.md, "([^"]+)"', text)}
    assert named
    assert named <= headings


def test_the_tree_in_the_design_is_the_tree() -> None:
    tree = DESIGN.partition("## Tree\n")[2].partition("\n## ")[0]
    drawn = sorted(name for line in tree.splitlines() for name in re.findall(r"[\w.]+\.py\b", line))
    there = sorted(
        path.name
        for folder in ("examples", "fp8ctl", "kernels", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" and not path.is_relative_to(ROOT / "fp8ctl" / "kernels")
    )
    assert [Path(name).name for name in drawn] == there


def test_the_readme_names_the_two_commands_and_make_has_them() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"make ([a-z][a-z-]*)", code_of(README)))
    assert {"demo", "test", "test-all"} <= named <= targets


def test_ci_runs_nothing_that_the_readme_does_not() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [runs] = re.findall(r"^exec (.+)$", script, re.M)
    assert runs in code_of(README)


def test_the_transcript_of_the_demo_is_there_and_whole() -> None:
    found = re.search(r"<!-- transcript: demo -->\n(.*?)<!-- /transcript -->", README, re.S)
    assert found
    transcript = found[1]
    for line in (
        r"^What is the capital of France\? .*Paris",
        r"^verdict: fp8-ok, \d+ tensors of codes and scales equal the source's, bit for bit",
        r"^everything was put back; \d+ s in all",
    ):
        assert re.search(line, transcript, re.M), line
    for step in ("doctor", "plan", "patch", "quantize", "launch", "check", "stop", "revert"):
        assert re.search(rf"^✓ {step}\b", transcript, re.M), step


def test_the_documents_name_no_machine_of_ours() -> None:
    transcriptless = PROSE + (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not re.search(r"/(work|tmp/w|root|home/\w+)/", transcriptless)
