"""Uploads happen only where they are asked for, are checked before the work, and leave what was written whole when they fail."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from reflow.errors import UserError
from reflow.export import hub


class Api:
    """The hub's client, as far as it is used; fails with `error` where one is given."""

    calls, error = [], None

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, **options):
        self.calls.append(("folder", options["folder_path"], options["repo_id"]))
        if self.error:
            raise self.error

    def upload_file(self, **options):
        self.calls.append(("file", options["path_or_fileobj"], options["path_in_repo"]))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(Api, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Api


@pytest.mark.parametrize(
    ("repo", "change", "words"),
    [
        ("no-owner", {}, "--push no-owner is no name of a repository"),
        ("../x/y", {}, "is no name of a repository"),
        ("me/model", {"offline": True}, "HF_HUB_OFFLINE is set"),
        ("me/model", {"token": None}, "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_is_said_first(api, monkeypatch, repo, change, words):
    if "token" in change:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", change.get("offline", False))
    with pytest.raises(UserError, match=words):
        hub.check(repo)
    assert not api.calls


def test_a_folder_and_a_file_with_its_card(api, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.safetensors").write_text("w")
    (tmp_path / "a.md").write_text("card")
    assert hub.push(tmp_path / "folder", "me/model") == "https://hub/me/model"
    hub.push(tmp_path / "a.safetensors", "me/model", card=tmp_path / "a.md", private=False)
    assert api.calls == [
        ("create", "me/model", {"private": True, "exist_ok": True}),
        ("folder", str(tmp_path / "folder"), "me/model"),
        ("create", "me/model", {"private": False, "exist_ok": True}),
        ("file", str(tmp_path / "a.safetensors"), "a.safetensors"),
        ("file", str(tmp_path / "a.md"), "README.md"),
    ]


@pytest.mark.parametrize("error", [ConnectionError("no network"), huggingface_hub.errors.HFValidationError("bad name"), TimeoutError("slow")])
def test_a_failed_upload_says_that_the_files_are_whole(api, monkeypatch, tmp_path, error):
    monkeypatch.setattr(Api, "error", error)
    with pytest.raises(UserError, match=f"is written, but could not be uploaded to me/model .*hf upload me/model {tmp_path}"):
        hub.push(tmp_path, "me/model")


def test_the_errors_of_the_hub_are_of_the_kinds_that_are_caught():
    for name in ("HfHubHTTPError", "RepositoryNotFoundError", "GatedRepoError", "HFValidationError", "LocalTokenNotFoundError"):
        assert issubclass(getattr(huggingface_hub.errors, name), (OSError, ValueError)), name
