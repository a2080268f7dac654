"""Keys of signatures: ECDSA on P-256, in PEM, as openssl and cosign write public ones. By `cryptography`."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import files
from builder.errors import PreflightError, Problem, UsageError
from builder.text import printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

#: Larger files hold no keys.
_LIMIT = 1 << 16
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,60})-----.*?-----END \1-----", re.DOTALL)
#: How a pair is made that both verbs and cosign take.
MAKE_A_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out FILE"


@dataclass(frozen=True)
class VerificationKey:
    """One public key. name: the file that it is from. fingerprint: of its SubjectPublicKeyInfo, for people."""

    name: str
    fingerprint: str
    _key: ec.EllipticCurvePublicKey

    def verifies(self, signature: bytes, payload: bytes) -> bool:
        """Return whether this is a signature of the payload by this key: DER, SHA-256."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            self._key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint})"


@dataclass(frozen=True)
class SigningKey:
    """One private key. public: its other half."""

    public: VerificationKey
    _key: ec.EllipticCurvePrivateKey

    def sign(self, payload: bytes) -> bytes:
        """Return a signature of the payload, in DER."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self._key.sign(payload, ec.ECDSA(hashes.SHA256()))


def verification_keys(paths: Sequence[Path], location: str = "--key") -> tuple[VerificationKey, ...]:
    """Return the public keys in these files, each of which may hold several.

    Raises UsageError with every problem, and PreflightError where `cryptography` is missing: a key that is configured
    is never passed over. location: the option or key of the policy that names the files.
    """
    serialization = _serialization()
    found: list[VerificationKey] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            blocks = _blocks(path)
            if not blocks:
                raise ValueError(f"holds no PEM; a public key is made so: openssl pkey -in {path} -pubout")
            found += [_public(serialization, kind, block, path) for kind, block in blocks]
        except ValueError as error:
            problems.append(Problem(location, f"{printable(str(path))} {error}."))
    if problems:
        raise UsageError(str(problems[0]) if len(problems) == 1 else "keys cannot be used", problems)
    return tuple(found)


def signing_key(path: Path, location: str = "--key") -> SigningKey:
    """Return the private key in a file. Raises UsageError, and PreflightError where `cryptography` is missing."""
    serialization = _serialization()
    try:
        blocks = _blocks(path)
        kinds = [kind for kind, _ in blocks]
        if any(kind in ("ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY") for kind in kinds):
            raise ValueError("is a private key of cosign, which cosign alone can use: cosign sign --key FILE")
        private = [block for kind, block in blocks if kind in ("PRIVATE KEY", "EC PRIVATE KEY")]
        if "ENCRYPTED PRIVATE KEY" in kinds or any(b"Proc-Type: 4,ENCRYPTED" in block for block in private):
            raise ValueError("is encrypted, and this verb asks for no passphrase: openssl pkey -in FILE -out DECRYPTED")
        if not private:
            what = "only a public key" if "PUBLIC KEY" in kinds else "no private key in PEM"
            raise ValueError(f"holds {what}; a key is made so: {MAKE_A_KEY}")
        if len(private) > 1:
            raise ValueError(f"holds {len(private)} private keys: one is wanted")
        key = serialization.load_pem_private_key(private[0], None)
        return SigningKey(_checked(serialization, key.public_key(), path), key)
    except (ValueError, TypeError) as error:
        text = str(error) if str(error).startswith(("is ", "holds ", "cannot ")) else "holds no key that can be read"
        raise UsageError(f"{location}: {printable(str(path))} {text}") from None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise PreflightError(
            "signatures need the package cryptography, which is not installed: pip install 'warm-cache[sign]'"
        ) from None
    return serialization


def _blocks(path: Path) -> list[tuple[str, bytes]]:
    """Return the PEM blocks of a file, with their kinds. Raises ValueError."""
    try:
        # Secrets of Kubernetes are links.
        raw = files.read_bytes(os.path.realpath(path), _LIMIT)
    except files.UnreadableError as error:
        text = str(error)
        raise ValueError(text if text.startswith(("is ", "cannot ")) else f"cannot be read: {text}") from None
    return [(found[1].decode("ascii"), found[0]) for found in _BLOCK.finditer(raw)]


def _public(serialization: Any, kind: str, block: bytes, path: Path) -> VerificationKey:
    """Return the key of one block. Raises ValueError, with the rest of a sentence that begins with the file."""
    if kind.endswith("PRIVATE KEY"):
        raise ValueError("holds a private key: machines that verify get the public one (openssl pkey -pubout)")
    if kind != "PUBLIC KEY":
        raise ValueError(f"holds a {kind.lower()}: a public key in PEM is wanted")
    try:
        key = serialization.load_pem_public_key(block)
    except Exception:  # noqa: BLE001 - it raises another one for algorithms that OpenSSL does not have
        raise ValueError("holds no public key that can be read") from None
    return _checked(serialization, key, path)


def _checked(serialization: Any, key: Any, path: Path) -> VerificationKey:
    """Return a public key of the one kind that signatures have here. Raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        curve = getattr(getattr(key, "curve", None), "name", "")
        kind = f"on the curve {curve}" if curve else type(key).__name__.lstrip("_").removesuffix("PublicKey")
        raise ValueError(
            f"holds a key of another kind ({kind}): ECDSA on P-256 is wanted; one is made so: {MAKE_A_KEY}"
        )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    raw = key.public_bytes(serialization.Encoding.DER, form)
    digest = base64.b64encode(hashlib.sha256(raw).digest()).decode("ascii").rstrip("=")
    return VerificationKey(printable(str(path)), f"SHA256:{digest}", key)
