"""training.ps1 is PowerShell that 5.1 understands, and does what it promises."""

import re

import pytest
import tree_sitter
import tree_sitter_powershell
from conftest import ROOT

from parts.commandline import parse_config

SOURCE = (ROOT / "training.ps1").read_bytes()
CODE = re.sub(r"(?m)(^|\s)#.*$", "", SOURCE.decode("ascii"))


def nodes(node: tree_sitter.Node):
    yield node
    for child in node.children:
        yield from nodes(child)


@pytest.fixture(scope="module")
def tree() -> tree_sitter.Tree:
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    assert parser.parse(b"if ($x { }").root_node.has_error, "the grammar must be able to refuse"
    return parser.parse(SOURCE)


def test_it_parses(tree):
    broken = [
        node.text.decode() for node in nodes(tree.root_node) if node.is_error or node.is_missing
    ]
    assert not broken


def test_nothing_that_5_1_lacks_or_trips_over():
    """PowerShell 5.1 has no && || ?? ?: and no $IsWindows, and turns redirected stderr into errors."""
    for pattern in (r"2>&1", r"&&", r"\|\|", r"\?\?", r"\$IsWindows", r"\?\."):
        assert not re.search(pattern, CODE), pattern


def test_the_flags_are_the_trainers(tree):
    array = CODE[CODE.index("$trainArgs = @(") : CODE.index(")")]
    arguments = re.findall(r"'([^']*)'", array)
    assert arguments[0] == "--preset"
    config = parse_config(arguments)
    assert (config.preset, config.out_dir.as_posix()) == ("gpt2", "out/gpt2")


def test_it_splats_its_arguments_and_keeps_the_exit_code(tree):
    commands = [node.text.decode() for node in nodes(tree.root_node) if node.type == "command"]
    assert "& $python train.py @trainArgs" in commands
    assert any(
        command.startswith("& $python update_readme.py --out_dir $outDir") for command in commands
    )
    assert "$trainArgs += $args" in CODE
    assert re.search(
        r"@trainArgs\s+\$exitCode = \$LASTEXITCODE\s+if \(\$exitCode -eq 0 -and ", CODE
    )
    assert CODE.rstrip().endswith("exit $exitCode")
    assert (
        "Push-Location -LiteralPath $PSScriptRoot" in CODE
        and "$ErrorActionPreference = 'Stop'" in CODE
    )
    assert CODE.count("SetThreadExecutionState($") == 2, "kept awake, and let go again"


def test_what_python_writes_to_stderr_is_no_error():
    """The editor of 5.1 makes an error of it, and 'Stop' would end the run."""
    before, _, after = CODE.partition("$ErrorActionPreference = 'Continue'")
    assert (
        "& $python" not in before
        and after.count("& $python") == 2
        and "ErrorActionPreference" not in after
    )


@pytest.mark.parametrize(("argument", "expected"), [("--out_dir=x/y", "x/y"), ("--out-dir=z", "z")])
def test_its_patterns_find_the_out_dir(argument, expected):
    """The two -match patterns, which are plain enough to mean the same in Python."""
    joined, apart = re.findall(r"-match '([^']*)'", CODE)
    assert re.match(joined, argument)[1] == expected
    assert re.match(apart, "--out_dir") and not re.match(apart, argument)
