"""Which servers the trainer trusts behind ``https://``, and the remedy for one that it does not."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

from moe_replay.errors import RecipeError

_KEY = "rollout.ca_file"
# X509_V_ERR_*: the certificate names another host, another address; it ended, or does not hold yet.
_OTHER_NAME, _OUT_OF_TIME = (62, 64), (9, 10)


def trust_in(ca_file: Path) -> ssl.SSLContext:
    """Return a context that trusts the certificates in a PEM file, and no others.

    Raises:
        RecipeError: when the file cannot be read, or holds no certificate.
    """
    expected = (
        "expected a PEM file with the certificate of the authority that signed those of the servers: "
        f"{_KEY} names it"
    )
    try:
        content = ca_file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{ca_file} cannot be read ({error.strerror}), {expected}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A file of another kind is refused, one of nothing but revocation lists is not.
    with suppress(ssl.SSLError):
        context.load_verify_locations(cafile=ca_file)
    if not context.cert_store_stats()["x509"]:
        held = "a private key and no certificate" if b"PRIVATE KEY-----" in content else "none"
        raise RecipeError(
            f"{ca_file} holds {held}, {expected}; `openssl x509 -inform der -in FILE -out FILE.pem` "
            "converts a binary one"
        )
    return context


def why_distrusted(error: BaseException, ca_file: Path | None) -> str | None:
    """Return the remedy for a certificate that is not trusted; None for other failures."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
        found = found.__cause__ or found.__context__
    if found is None:
        return None
    if found.verify_code in _OTHER_NAME:
        return (
            "the server's certificate is that of another host: write the name that it holds in "
            "rollout.urls, or issue another"
        )
    if found.verify_code in _OUT_OF_TIME:
        return "issue another certificate, or set the clock of this machine"
    if ca_file is None:
        return (
            "the server's certificate is not signed by an authority that this machine trusts: name "
            "the PEM file of the one that signed it (or the certificate itself, if self-signed) in "
            f"{_KEY}"
        )
    return (
        f"the server's certificate is not signed by one in {ca_file} ({_KEY}), and no others are "
        "trusted: add the authority that signed it, or correct rollout.urls"
    )
