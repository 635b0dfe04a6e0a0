"""A chapter's checks without readable answers, for a workshop's participants.

The checks need the right answers, so these must travel with them. Packed they are not read by
accident. This is no secret: who wants to can unpack them.
"""

import base64
import linecache
import textwrap
import zlib
from types import CodeType

HEAD = '''"""A chapter's checks, packed, so that nobody meets an answer by accident."""

from dpo_mini.course.checks.sealing import unsealed

exec(unsealed("""
{packed}
""", __file__))
'''


def sealed(text: str) -> str:
    """A module's text as another module that does the same and shows nothing."""
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode().replace("\\", "\\\\")
    return HEAD.format(packed="\n".join(textwrap.wrap(packed, 96)))


def unsealed(packed: str, path: str) -> CodeType:
    """The packed module, ready to be executed. Its lines are known to `inspect`, since the checks
    make mistakes out of the text of right answers.
    """
    text = zlib.decompress(base64.b85decode("".join(packed.split()))).decode()
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    return compile(text, path, "exec")
