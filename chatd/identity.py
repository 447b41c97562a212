"""Who a visitor is: a short-lived token that the server of the site signs.

A token is a JSON Web Token (RFC 7519) signed with HMAC-SHA-256 (`HS256`, RFC 7518 section 3.2)
and the chatbot's identity secret, which only chatd and that server know.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import jwt

from chatd.errors import IdentityRequired

SECRET_PREFIX = "cs_"

ALGORITHM = "HS256"

MAX_TOKEN_CHARS = 4096
"""More than any token for this needs; a request's headers hold 16 KiB."""

MAX_SUBJECT_CHARS = 200

MAX_AHEAD_SECONDS = 24 * 3600.0
"""How far ahead a token's end may be: what a page holds may be stolen."""

LEEWAY_SECONDS = 30.0
"""How far the clocks of the two servers may be apart."""


def new_identity_secret() -> str:
    """A random secret of 256 bits, as long as the digest (RFC 7518 section 3.2 asks for that)."""
    return SECRET_PREFIX + secrets.token_urlsafe(32)


def subject(token: str, keys: Sequence[str]) -> str:
    """The visitor that a token names, signed with one of `keys`.

    Raises `IdentityRequired`, which says what is wrong with the token and never what it holds.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise IdentityRequired("The user_token is too long.")
    claims = _claims(token, keys)
    end, name = claims["exp"], claims["sub"]
    if isinstance(end, bool) or not isinstance(end, int | float):
        raise IdentityRequired("The user_token's exp must be a number of seconds since 1970.")
    if end > time.time() + MAX_AHEAD_SECONDS + LEEWAY_SECONDS:
        raise IdentityRequired("The user_token's exp must be within 24 hours from now.")
    # What is not printable is what storage may not hold, and what looks like another name.
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= MAX_SUBJECT_CHARS
        or not name.isprintable()
    ):
        raise IdentityRequired("The user_token's sub must be 1 to 200 printable characters.")
    return name


def _claims(token: str, keys: Sequence[str]) -> dict[str, Any]:
    """What a token says, once its signature and its time are checked. Raises `IdentityRequired`."""
    for key in keys:
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                leeway=LEEWAY_SECONDS,
                # A secret is one chatbot's, so there is nobody else whom a token could be for.
                options={"require": ["exp", "sub"], "verify_aud": False},
            )
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError:
            raise IdentityRequired("The user_token has expired. Get a new one.") from None
        except jwt.ImmatureSignatureError:
            raise IdentityRequired("The user_token is not valid yet.") from None
        except jwt.MissingRequiredClaimError as error:
            raise IdentityRequired(f"The user_token has no {error.claim}.") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            break
    raise IdentityRequired("The user_token is not one that this chatbot's identity secret signed.")
