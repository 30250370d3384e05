import sys

import autoaccum
from autoaccum import errors


def test_the_tree_in_the_docstring_is_the_tree():
    lines = [line.translate(str.maketrans("", "", "├─└│")).split() for line in errors.__doc__.splitlines()]
    classes = {name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.AutoaccumError)}
    assert set(classes) <= {words[0] for words in lines if words}
    codes = {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[0] in classes and words[1].isdigit()}
    assert codes == {name: classes[name].exit_code for name in classes if name != "AutoaccumError"}


def test_every_error_is_public():
    for name, each in vars(errors).items():
        if isinstance(each, type) and issubclass(each, errors.AutoaccumError):
            assert getattr(autoaccum, name) is each


def test_a_note_is_kept_on_the_error_itself():
    error = errors.noted(ValueError("theirs"), "ours")
    assert error.__notes__ == ["ours"]
    assert str(error) == "theirs"


def test_the_short_traceback_has_the_users_frames_and_no_others(tmp_path):
    import torch

    def users_loss():
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    try:
        torch.nn.Sequential(torch.nn.Identity())(users_loss())
    except RuntimeError as error:
        short = errors.in_short(error)
    assert "users_loss" in short
    assert "site-packages" not in short and sys.base_prefix not in short
