"""Failures of requests in words. Messages name hosts, no whole URLs: those of uploads and redirects hold signatures."""

from __future__ import annotations

import email.utils
import ssl
import time

from builder.errors import RegistryRefusedError
from builder.text import printable, shortened

#: What OpenSSL calls an answer that is no TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


class TransientError(Exception):
    """A failure that may not happen again. after: seconds that the registry asks to wait; None if it names none."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class PlainHttpError(TransientError):
    """The other side answered a TLS greeting with something else."""


def failure(error: Exception, host: str) -> Exception:
    """Return the exception for a request that got no answer, without the URL that those of requests hold."""
    import requests

    reason = _reason(error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RegistryRefusedError(
            f"{host}: its certificate is not trusted ({reason.verify_message}): "
            "pass the certificate of its authority with --ca-file FILE"
        )
    if isinstance(reason, ssl.SSLError):
        name = reason.reason or "no TLS"
        if name in _NO_TLS:
            return PlainHttpError(f"{host}: TLS failed ({name})")
        return TransientError(f"{host}: TLS failed ({name})")
    lasting = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.InvalidHeader)
    if isinstance(error, lasting) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return RegistryRefusedError(f"{host}: this is no request that can be made ({type(error).__name__})")
    if isinstance(reason, TimeoutError):
        return TransientError(f"{host} did not answer in time")
    text = (reason.strerror or str(reason)) if isinstance(reason, OSError) else type(reason).__name__
    return TransientError(f"{host}: {printable(shortened(text, 120))}")


def retry_after(text: str) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None for none."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _reason(error: BaseException) -> BaseException:
    """Return the innermost exception: requests and urllib3 wrap those of sockets several times."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = [*error.args, getattr(error, "reason", None), error.__cause__, error.__context__]
        error = next((each for each in inner if isinstance(each, BaseException)), error)
    return error
