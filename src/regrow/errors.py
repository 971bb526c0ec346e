"""What a user can cause. Standard library only.

This is the one module that lies below `models`, `checkpoint`, `trainer` and `launch`: each of them refuses fields of
the config, `models` and `checkpoint` do not know each other, and the command must tell a refusal from a bug by one
class.
"""

__all__ = ["ConfigError"]


class ConfigError(ValueError):
    """Something that a user gave cannot be used; the message is the whole explanation.

    It is one sentence that names the field, the rule, the value and the remedy. The command prints it without a
    traceback and ends with exit code 2. Any other ValueError is a bug, and is shown as one.
    """
