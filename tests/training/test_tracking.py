"""Weights & Biases without package, login or network: told before training, and never asked for."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from stlm.errors import UserError
from stlm.training import tracking
from stlm.training.loop import train
from stlm.training.tracking import check_tracking


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user who has logged in nowhere."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_without_a_login_it_is_told(make_run):
    with pytest.raises(UserError, match="no login here: run `wandb login`, set WANDB_MODE=offline"):
        check_tracking()
    with pytest.raises(UserError, match="no login here"):  # without the check of `stlm train`, too
        train(make_run(wandb=True))


def test_a_login_is_found_where_it_may_be(nobody, monkeypatch):
    nobody.mkdir()
    (nobody / ".netrc").write_text("machine example.org\n  login me\n  password secret\n")
    assert check_tracking() is None
    (nobody / ".netrc").unlink()
    (nobody / "wandb").mkdir()
    (nobody / "wandb" / "settings").write_text("[default]\napi_key = secret\n")
    assert check_tracking() is None
    (nobody / "wandb" / "settings").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert check_tracking() is None


@pytest.mark.parametrize(("mode", "said"), [("offline", "wandb sync"), ("disabled", "nothing is logged")])
def test_a_mode_that_sends_nothing_is_told_and_needs_no_login(monkeypatch, mode, said):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert said in check_tracking()


def test_without_the_package_it_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package wandb: install it"):
        check_tracking()


def test_what_wandb_refuses_is_a_line_and_nothing_is_asked(make_run, monkeypatch):
    class Error(Exception):
        pass

    def init(**settings):
        assert sys.stdin.read() == ""
        raise Error("the server\nis on holiday")

    monkeypatch.setenv("WANDB_API_KEY", "secret")
    fake = type(sys)("wandb")
    fake.init, fake.errors = init, type("errors", (), {"Error": Error})
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    before = sys.stdin
    with pytest.raises(UserError, match="cannot start: the server is on holiday; mend that, set WANDB_MODE"):
        tracking.start_tracking(make_run(wandb=True), "0123456789")
    assert sys.stdin is before
