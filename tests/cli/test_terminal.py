"""The command as a process: how fast it answers, Ctrl-C, closed pipes, and what a terminal shows."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

ENDLESS = ("--prompt", "Once upon a time", "--max-new-tokens", "1000000", "--window", "64", "--temperature", "0")


def start(command, *arguments, **more) -> subprocess.Popen:
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("generate", "--help"), ("chat", "--help"), ()])
def test_help_and_version_load_nothing_heavy(arguments, environment) -> None:
    code = "import sys, longburn.cli.main as m; m.execute(sys.argv[1:]); heavy = {'torch', 'numpy', 'transformers'}; "
    code += "print(sorted(heavy & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    *shown, heavy = result.stdout.splitlines()
    assert shown
    assert heavy == "[]"


def test_version(command) -> None:
    from importlib.metadata import version

    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"longburn {version('longburn')}\n"


def test_ctrl_c_keeps_the_text_so_far(command, tiny, environment) -> None:
    with start(command, "generate", "--model", tiny, *ENDLESS, env=environment) as process:
        first = process.stdout.read(20)  # text comes while the command still runs
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert len(first) == 20
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in err
    assert err.splitlines()[-1].startswith(b"prefill ")


def test_ctrl_c_while_loading_is_quiet(command, tiny, environment) -> None:
    with start(command, "generate", "--model", tiny, *ENDLESS, env=environment) as process:
        time.sleep(1.0)  # importing PyTorch
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_closed_pipe_is_quiet(command, tiny, environment) -> None:
    with start(command, "generate", "--model", tiny, *ENDLESS, env=environment) as process:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        process.wait(timeout=30)
        err = process.stderr.read()
    assert process.returncode != 0
    assert err == b""


def on_terminal(arguments, environment, *, until: bytes) -> str:
    """All that a terminal shows of a command, up to `until` or its end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(arguments[0], arguments, environment)
    shown, deadline = b"", time.monotonic() + 60
    while until not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the command has ended
                break
            if not data:
                break
            shown += data
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode()


def test_a_long_prefill_shows_a_bar_on_the_terminal(tiny, environment) -> None:
    code = "import longburn.cli.stream as s; s.BAR_AFTER = 0; from longburn.cli.main import run; run()"
    prompt = "Why is the sky blue? " * 40
    arguments = ["generate", "--model", tiny, "--prompt", prompt, "--chunk-size", "3", "--max-new-tokens", "3"]
    shown = on_terminal([sys.executable, "-c", code, *arguments], environment, until=b"position ")
    assert "reading the prompt" in shown
    assert "━" in shown


def test_what_is_not_the_answer_is_dim_on_the_terminal(environment) -> None:
    code = "from longburn.cli.display import Screen\nfrom longburn.cli.reading import Piece\nwith Screen() as show:\n"
    code += " for text, label in (('Hm', 'analysis'), ('m.', 'analysis'), ('Blue', None), ('.', None)):\n"
    code += "  show(Piece(text, label))\nprint('done')"
    shown = on_terminal([sys.executable, "-c", code], environment, until=b"done").replace("\r\n", "\n")
    dim = "\x1b[2m{}\x1b[0m".format
    assert shown == dim("[analysis]\n") + dim("Hm") + dim("m.") + dim("\n") + "Blue.\ndone\n"


def test_no_bar_in_a_pipe(command, tiny, environment) -> None:
    prompt = "Why is the sky blue? " * 40
    arguments = ["generate", "--model", tiny, "--prompt", prompt, "--chunk-size", "3", "--max-new-tokens", "3"]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr + result.stdout
