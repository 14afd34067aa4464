"""``zero env``."""

from __future__ import annotations

import json

import pytest
import torch
from report_samples import render

from zero.cli import env as env_module


class TestEnv:
    def test_what_a_bug_report_needs_is_there(self) -> None:
        env = env_module.collect_env()
        assert env["torch"] == torch.__version__
        assert "usable" in env["cores"]
        assert "available of" in env["host memory"]
        for name in ("python", "platform", "accelerators", "pinned memory", "C compiler", "native AdamW", "disk"):
            assert env[name]
        assert env_module.env_text(env).count("\n") == len(env) - 1
        assert json.loads(env_module.env_json(env)) == env
        assert env["torch"] in render(env_module.env_table(env), width=200)

    def test_no_secrets_and_no_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("WANDB_API_KEY", "another_secret")
        monkeypatch.setenv("HOME", "/home/a_persons_name")
        monkeypatch.setenv("HF_HOME", "/home/a_persons_name/hub")
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        env = env_module.collect_env()
        text = env_module.env_text(env)
        assert "secret" not in text
        assert "a_persons_name" not in text
        assert env["HF_HOME"] == "~/hub"
        assert env["OMP_NUM_THREADS"] == "3"

    def test_a_failing_probe_is_an_entry_not_a_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> str:
            raise OSError("driver is gone")

        monkeypatch.setitem(env_module._PROBES, "accelerators", broken)
        assert env_module.collect_env()["accelerators"] == "unknown (OSError: driver is gone)"

    def test_a_compiler_that_does_not_exist_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "/nowhere/cc")
        env = env_module.collect_env()
        assert "CC=/nowhere/cc does not run" in env["C compiler"]
        assert env["native AdamW"].startswith("not available")
