"""What must not be read by whoever reads a log, an error or a stored spec: secrets in text, masked in one place. Light."""

from __future__ import annotations

import re

MASK = "***"

# Every repetition is bounded: the texts come from strangers, and a pattern must not be a way to keep a processor busy.
_PREFIX = r"[A-Za-z0-9_.-]{0,40}?"
_SECRET = (
    r"(?:token|secret|passw(?:or)?d|pwd|credentials?|signature|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key)"
)

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ or token@ before a host
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#@'\"]{1,1000}@"), rf"\1{MASK}@"),
    # the same, shortened before its @ came
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#@:'\"]{1,200}:[^\s/?#@'\"]{6,200}\.\.\."), rf"\1{MASK}..."),
    (re.compile(r"ncfm_([0-9a-f]{12})_[0-9a-f]{8,64}"), rf"ncfm_\1_{MASK}"),
    (re.compile(r"\b(bearer|basic)[ \t]{1,8}[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {MASK}"),
    # ?token=..., &X-Amz-Signature=...
    (re.compile(rf"([?&;]{_PREFIX}(?:{_SECRET}|key|sig)=)[^&#\s'\"]{{1,2000}}", re.IGNORECASE), rf"\1{MASK}"),
    # aws_secret_access_key = ..., "password": "..."
    (
        re.compile(
            rf"((?<![A-Za-z0-9_.-]){_PREFIX}{_SECRET}['\"]?[ \t]{{0,3}}[:=][ \t]{{0,3}}['\"]?)[A-Za-z0-9._~+/=-]{{16,}}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b"), MASK),
    (
        re.compile(
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        MASK,
    ),
)


def redact(text: str) -> str:
    """The text with every secret that can be told as one masked."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
