"""What shells complete."""

from __future__ import annotations

import subprocess

import pytest

from builder.cli import main as cli
from builder.cli import options as words


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    asked = f"COMP_WORDS=(warm-cache {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}"
    offered = 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}\n_shtab_warm_cache\n{offered}"], capture_output=True, text=True, timeout=30
    )
    return done.stdout.split()


def test_completion_bash_completes_verbs_options_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"], environ={}) == 0
    script = capsys.readouterr().out
    assert "check" in completed(script, "ch")
    assert "--strict" in completed(script, "check", "--st")
    assert completed(script, "check", "--profile", "h20") == ["h200"]
    assert set(completed(script, "env", "--format", "")) == set(words.OPTIONS["format"]["choices"])


@pytest.mark.parametrize("shell_name", ["zsh", "fish", "tcsh"])
def test_completion_every_shell_gets_a_script(shell_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell_name], environ={}) == 0
    assert "warm-cache" in capsys.readouterr().out


def test_completion_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bsh"], environ={}) == 2
    assert "SHELL is 'bsh': did you mean 'bash'?" in capsys.readouterr().err
