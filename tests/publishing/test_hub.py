"""Pushing over HTTP to a server that speaks the Hub's API, and loading back from it."""

import io
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import repeat

import numpy as np
import pytest
from helpers.commands import assert_one_sentence, tlora
from helpers.exports import export_peft
from helpers.hub_server import READER, SIGNATURE, TOKEN, hub_environment
from helpers.logits import TOKENS, logits_of, mlx_logits
from helpers.models import files_of
from mlx_lm import load

from tlora_mlx import RunError, UserError, push, read_run
from tlora_mlx.publishing.card import write_card
from tlora_mlx.publishing.hub import check_rights
from tlora_mlx.storage.files import file_digest

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "rank_plan.png"]
NAME = "ann/tuned"


@pytest.fixture
def client_log():
    """The client's log, which goes to the terminal."""
    text = io.StringIO()
    logger, handler = logging.getLogger("huggingface_hub"), logging.StreamHandler(text)
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def adapter(run_path, tmp_path_factory):
    """An exported directory, to push."""
    output = tmp_path_factory.mktemp("exports") / "adapter"
    run = read_run(run_path)
    write_card(export_peft(run, output, base_model="maker/base"), run, "peft", "maker/base", NAME)
    return output


def secretless(text, *directories):
    """Check that there is no secret in a text, nor in any file below the directories."""
    texts = [text.encode()]
    texts += [p.read_bytes() for d in directories for p in d.rglob("*") if p.is_file()]
    for secret in (TOKEN, READER, SIGNATURE):
        assert not any(secret.encode() in content for content in texts)
    return True


def pushed(server, directory, commits=1, name=NAME):
    """Whether the repository has the directory's files, after that many commits of ours."""
    repository = server.repositories[name]
    stored = {k: v for k, v in repository.files.items() if k != ".gitattributes"}
    return stored == files_of(directory) and len(repository.commits) == 1 + commits


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_command_pushes_and_the_cards_code_loads(
    hub, run_path, model_path, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    result = tlora(
        *("export", run_path, "--output", output, "--push-to", NAME, "--private"),
        *("--base-model", "maker/base"),
        env=hub_environment(hub, tmp_path / "home"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert f"pushed: {hub.endpoint}/{NAME}/commit/{hub.repositories[NAME].sha}" in result.stdout
    assert sorted(files_of(output)) == FILES
    assert pushed(hub, output)
    assert hub.repositories[NAME].private
    assert secretless(result.stdout + result.stderr, tmp_path, run_path)

    hub.create("maker/base", files=files_of(model_path))
    monkeypatch.chdir(tmp_path)
    peft, merge = python_blocks((output / "README.md").read_text())
    names = {}
    exec(peft, names)
    assert np.abs(logits_of(names["model"]) - mlx_logits(run_path)).max() < 1e-4
    exec(merge, names)
    import mlx.core as mx

    merged = np.array(load("merged")[0](mx.array(TOKENS)))
    assert np.abs(merged - mlx_logits(run_path)).max() < 1e-4


def test_a_repository_that_exists(hub, adapter, tmp_path):
    push(adapter, NAME)
    assert not hub.repositories[NAME].private
    assert hub.asked("POST", "/repos/create") == 1
    first = push(adapter, NAME)
    assert pushed(hub, adapter)  # nothing changed, so there is no second commit
    assert first.endswith(hub.repositories[NAME].sha)
    hub.create(NAME, files={"notes.txt": b"mine", "README.md": b"---\n---\nold"})
    push(adapter, NAME)
    assert hub.repositories[NAME].files["notes.txt"] == b"mine"
    assert hub.repositories[NAME].files["README.md"] == (adapter / "README.md").read_bytes()
    with pytest.raises(RunError, match="but ann/tuned is public; choose another name"):
        push(adapter, NAME, private=True)
    hub.create(NAME, files={"model-00002-of-00002.safetensors": b"", "old/a.safetensors": b""})
    with pytest.raises(
        RunError, match=r"has model-00002-of-00002\.safetensors from another export"
    ):
        push(adapter, NAME)
    assert len(hub.repositories[NAME].commits) == 2


@pytest.mark.parametrize(
    ("method", "path", "faults"),
    [
        ("GET", "/api/models/", [503, 500]),
        ("GET", "/api/models/", ["close"]),
        ("POST", "/repos/create", [502, 504]),
        ("POST", "/repos/create", ["lose"]),
        ("POST", "/preupload/", [503, 503]),
        ("POST", "/objects/batch", [503, 429]),
        ("PUT", "/lfs/", ["close", 500, "close"]),
        ("POST", "/objects/verify", ["lose"]),
        ("POST", "/validate-yaml", [503]),
        ("POST", "/commit/", [503, 503]),
        ("POST", "/commit/", ["lose"]),
    ],
)
def test_temporary_failures_are_retried(hub, adapter, method, path, faults):
    answers = iter(faults)
    hub.fail(method, path, answers)
    push(adapter, NAME)
    assert pushed(hub, adapter)
    assert next(answers, "all met") == "all met"


def one_sentence(hub, text, directory, words):
    """A failure's message: what happened, how to retry, no secret; nothing was pushed yet."""
    assert "\n" not in text
    assert re.search(words, text), text
    again = f"python -m tlora_mlx upload {directory} {NAME}"
    assert f"{directory} is complete; push it again with: {again}" in text
    assert sorted(files_of(directory)) == FILES
    assert secretless(text, directory)
    assert NAME not in hub.repositories or len(hub.repositories[NAME].commits) == 1


@pytest.mark.parametrize(
    ("token", "method", "path", "faults", "words"),
    [
        ("hf_wrong", None, None, None, r"does not accept the token.*401: Invalid credentials"),
        (READER, None, None, None, r"may not write to ann/tuned.*403: You don't have the rights"),
        (TOKEN, "POST", "/repos/create", [409], r"ann/tuned exists, or is being changed.*\(409"),
        (TOKEN, "POST", "/preupload/", [403], r"the token may not write to ann/tuned"),
        (TOKEN, "POST", "/commit/", [404], r"the token does not reach ann/tuned"),
        (TOKEN, "POST", "/commit/", [413], r"the Hub refused the push \(413: a fault"),
        (TOKEN, "POST", "/commit/", repeat(503), r"the Hub failed \(503: a fault.*; try later"),
        (
            TOKEN,
            "POST",
            "/repos/create",
            repeat(500),
            r"the Hub failed \(500: a fault.*; try later",
        ),
        (TOKEN, "PUT", "/lfs/", repeat(500), r"the Hub failed \(500: a fault.*; try later"),
        (
            TOKEN,
            "PUT",
            "/lfs/",
            repeat("close"),
            r"the Hub at http://127\S+ could not .* broke: Server disconnected",
        ),
        (TOKEN, "POST", "/validate-yaml", [400], r"the Hub refused the push \(400: a fault"),
        (TOKEN, "POST", "/objects/batch", [{}], r"the push failed: Malformed response"),
    ],
)
def test_refusals_and_failures(
    hub, adapter, monkeypatch, client_log, token, method, path, faults, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    if method:
        hub.fail(method, path, faults)
    with pytest.raises(RunError) as failure:
        push(adapter, NAME)
    one_sentence(hub, str(failure.value), adapter, words)
    assert token not in str(failure.value)
    assert client_log.getvalue() == ""


@pytest.mark.parametrize(
    ("token", "name", "answer", "words"),
    [
        ("hf_wrong", NAME, None, r"does not accept the token \(401.*hf auth login"),
        (READER, NAME, None, "the token may only read; choose"),
        (TOKEN, "maker/base", None, "the token of ann may not write to maker/base; choose"),
        (TOKEN, "ann/public", None, "but ann/public is public; choose another name"),
        (TOKEN, NAME, 429, "too many requests from this account"),
        (TOKEN, NAME, {"type": "user"}, "the push failed: "),
        (TOKEN, NAME, "nowhere", "the Hub at http://127.0.0.1:9 could not be reached"),
    ],
)
def test_rights_are_checked_before_the_export(
    hub, tlora_here, run_path, tmp_path, monkeypatch, token, name, answer, words
):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", token)
    hub.create("ann/public")
    if answer == "nowhere":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port
    elif answer:
        hub.fail("GET", "/whoami-v2", [answer])
    options = ["--base-model", "maker/base", "--push-to", name, "--private"]
    result = tlora_here("export", run_path, "--output", tmp_path / "out", *options)
    assert result.returncode == 1
    assert re.fullmatch(rf"error: .*{words}.*; nothing was exported\n", result.stderr)
    assert not (tmp_path / "out").exists()
    assert hub.asked("POST", "") == 0
    assert secretless(result.stdout + result.stderr)


def test_names_that_a_token_may_write_to(hub, monkeypatch):
    """An organisation's; and with a fine-grained token any, which only trying can tell."""
    check_rights("ann-lab/tuned")
    fine = {"type": "user", "name": "ann", "auth": {"accessToken": {"role": "fineGrained"}}}
    hub.fail("GET", "/whoami-v2", [fine])
    check_rights("maker/tuned", private=True)
    assert hub.asked("POST", "") == 0


def test_retrying_with_the_command_from_the_message(hub, adapter, tlora_here, run_path):
    hub.fail("POST", "/commit/", [404])
    with pytest.raises(RunError) as failure:
        push(adapter, NAME, private=True)
    command = shlex.split(str(failure.value).split("again with: python -m tlora_mlx ")[1])
    assert command == ["upload", str(adapter), NAME, "--private"]
    again = tlora_here(*command)
    assert (again.returncode, again.stderr) == (0, "")
    assert hub.repositories[NAME].sha in again.stdout
    assert pushed(hub, adapter)
    assert hub.repositories[NAME].private


def test_directories_other_than_exports(hub, tlora_here, run_path, model_path, data_path, tmp_path):
    run = read_run(run_path)  # whose base model is a directory
    local = export_peft(run, tmp_path / "local")
    for directory, words in [
        (run_path, "is not an export; make one with tlora export"),
        (data_path, "is not an export"),
        (tmp_path / "nothing", "is not an export"),
        (local, f"the base model {model_path} is a directory on this machine"),
    ]:
        result = tlora_here("upload", directory, NAME)
        assert result.returncode == 2
        assert words in result.stderr
    assert hub.requests == []


def test_only_the_export_is_pushed(hub, adapter, tlora_here, tmp_path):
    """And what is wrong with it is said before a repository is created."""
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / ".gitignore").write_text("*")
    for name in (".env", ".git", "notes.md", ".hidden.json"):
        (copy / name).write_text("SECRET=1")
    (copy / "README.txt").symlink_to("/proc/self/environ")
    result = tlora_here("upload", copy, NAME)
    assert_one_sentence(result, 2, f"{copy / 'README.txt'} is a link to ")
    (copy / "README.txt").unlink()
    (copy / "adapter_config.json").rename(tmp_path / "config")
    (copy / "adapter_config.json").write_text("[]")
    assert_one_sentence(tlora_here("upload", copy, NAME), 2, "is not an adapter's configuration")
    assert hub.requests == []
    (tmp_path / "config").replace(copy / "adapter_config.json")
    result = tlora_here("upload", copy, NAME)
    assert result.returncode == 0, result.stderr
    left_out = ".cache, .env, .git, .hidden.json, notes.md"
    assert f"not part of the export, so not pushed: {left_out}" in result.stdout
    assert pushed(hub, adapter)


@pytest.mark.parametrize("without_xet", ["0", "1"])
def test_ctrl_c_during_an_upload(hub, run_path, tmp_path, without_xet):
    hub.xet = True
    hub.fail("PUT", "/lfs/", ["hang"])
    hub.fail("POST", "/v1/xorbs/", ["hang"])
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tlora_mlx.export", run_path, "--output", output]
    process = subprocess.Popen(
        [*map(str, command), "--push-to", NAME, "--base-model", "maker/base"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=hub_environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET=without_xet),
    )
    assert hub.hanging.wait(60)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted; \S+ is complete; push it again with: .+\n", error)
    assert sorted(files_of(output)) == FILES
    assert len(hub.repositories[NAME].commits) == 1
    assert secretless(out + error, output)


@pytest.mark.parametrize("xet", [True, False])
def test_xet(hub, adapter, tmp_path, xet):
    """With hf_xet on, the default: chunks go to a separate store, which may refuse them."""
    hub.xet = xet
    code = "import pathlib, sys; from tlora_mlx.publishing import hub, hub_requests as requests; "
    code += "requests.WAITS = (); hub.push(pathlib.Path(sys.argv[1]), sys.argv[2])"
    result = subprocess.run(
        [sys.executable, "-c", code, adapter, NAME],
        capture_output=True,
        text=True,
        timeout=120,
        env=hub_environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET="0"),
    )
    if result.returncode == 0 and hub.lfs:  # older clients ask for LFS, and get it
        assert pushed(hub, adapter)
    elif xet:
        assert (result.returncode, result.stderr) == (0, "")
        files = hub.repositories[NAME].files
        for name in ("adapter_model.safetensors", "rank_plan.png"):
            assert files[name].decode() == file_digest(adapter / name, name)
        assert len(hub.xorbs) == 2
        assert hub.asked("POST", "/commit/") == 1
    else:
        told = result.stderr.splitlines()[-1].removeprefix("tlora_mlx.errors.RunError: ")
        one_sentence(hub, told, adapter, "xet-write-token")
    assert secretless(result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("options", "token", "words"),
    [
        (["--push-to", "tuned"], TOKEN, "must be USER/NAME or ORGANISATION/NAME"),
        (["--push-to", "a/b/c"], TOKEN, "repository 'a/b/c': Repo id must be in the form"),
        (["--push-to", "ann/-x"], TOKEN, "repository 'ann/-x': Repo id must use alphanumeric"),
        (["--push-to", "ann/a b"], TOKEN, "repository 'ann/a b': Repo id must use alphanumeric"),
        (["--push-to", ""], TOKEN, "--push-to must not be empty"),
        (["--private"], TOKEN, "--private needs --push-to USER/NAME"),
        (["--push-to", NAME], "", "log in with hf auth login, or set HF_TOKEN"),
        (["--push-to", NAME], "hf_a b", "has invalid characters"),
        (["--push-to", NAME, "--base-model", "/models/mine"], TOKEN, "directory on this machine"),
    ],
)
def test_bad_input(hub, tlora_here, run_path, tmp_path, monkeypatch, options, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    result = tlora_here("export", run_path, "--output", tmp_path / "out", *options)
    assert result.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert words in result.stderr
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


def test_offline(adapter):
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        push(adapter, NAME)
