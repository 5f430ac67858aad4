"""Frames of a server's answer, so that it can report progress and errors after it has begun.

A frame is its kind (1 byte), the length of its payload (4 bytes, little-endian), the payload, and
the CRC-32 of all of these. Progress with the payload ``{}`` is::

    50        02 00 00 00   7b 7d     7e 3a 0e 11
    P         2 bytes       {}        CRC-32 of the 7 bytes before it

An answer is any number of progress frames, and then one that holds the result or an error.

In: payloads. Out: bytes; and back.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable

from moe_replay.errors import CodecError

CONTENT_TYPE = "application/x-moe-replay"
"""Content type of every body; a web page may not send it to another origin unasked."""
PROGRESS, RESULT, ERROR = b"P", b"R", b"E"
"""Kinds of frames; payloads of `PROGRESS` and `ERROR` are JSON."""
_HEADER_BYTES, _SUM_BYTES = 5, 4
_MAX_PAYLOAD_BYTES = (1 << 32) - 1
# Longer progress is damage, not progress.
_MAX_PROGRESS_BYTES = 1 << 16


def frame(kind: bytes, payload: bytes) -> bytes:
    """Return a frame.

    Raises:
        CodecError: when the payload does not fit, above 4 GiB.
    """
    if len(payload) > _MAX_PAYLOAD_BYTES:
        raise CodecError(
            f"an answer of {len(payload)} bytes does not fit into a frame of at most "
            f"{_MAX_PAYLOAD_BYTES}; ask for fewer completions in a call"
        )
    header = kind + len(payload).to_bytes(4, "little")
    return b"".join(
        [header, payload, zlib.crc32(payload, zlib.crc32(header)).to_bytes(4, "little")]
    )


def error_frame(status: int, text: str) -> bytes:
    """Return the frame of an error that would have had this HTTP status before the answer began."""
    return frame(ERROR, json.dumps({"status": status, "text": text}).encode())


def last_frame(body: bytes) -> tuple[bytes, bytes]:
    """Return kind and payload of the frame that ends an answer, all frames before it checked.

    Raises:
        CodecError: when a frame is damaged, the answer is cut, or it holds something else.
    """
    view, start = memoryview(body), 0
    while start < len(body):
        kind, end = body[start : start + 1], start + _HEADER_BYTES
        payload_end = end + int.from_bytes(view[start + 1 : end], "little")
        stop = payload_end + _SUM_BYTES
        # The sum covers the kind and the length too.
        if stop > len(body) or zlib.crc32(view[start:payload_end]) != int.from_bytes(
            view[payload_end:stop], "little"
        ):
            raise CodecError(
                f"the answer of {len(body)} bytes is damaged: the frame at byte {start} is cut, or has "
                "another checksum"
            )
        if kind != PROGRESS:
            if kind not in (RESULT, ERROR) or stop != len(body):
                raise CodecError(
                    f"the answer is damaged: a frame of kind {kind!r} ends at byte {stop} of "
                    f"{len(body)}, expected a result or an error as the last one"
                )
            return kind, bytes(view[end:payload_end])
        start = stop
    raise CodecError(
        f"the answer of {len(body)} bytes is damaged: it ends without a result; the server ended while "
        "it answered"
    )


def read_error(payload: bytes) -> tuple[int, str]:
    """Return status and text of an error frame.

    Raises:
        CodecError: when it holds something else.
    """
    try:
        message = json.loads(payload)
        return int(message["status"]), str(message["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise CodecError(f"the error in the answer is damaged: {error}") from error


class ProgressWatch:
    """Finds the progress frames in an answer while it arrives; nothing else of it is kept.

    ``on_progress`` gets their payloads. Damage ends the watch: `last_frame` names it when the
    answer is whole.

    Examples:
        >>> seen = []
        >>> watch = ProgressWatch(seen.append)
        >>> for byte in frame(PROGRESS, b"{}"): watch.feed(bytes([byte]))
        >>> seen
        [b'{}']
    """

    def __init__(self, on_progress: Callable[[bytes], None]) -> None:
        self._on_progress = on_progress
        self._kept = bytearray()
        self._is_over = False

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the answer."""
        if self._is_over:
            return
        self._kept += piece
        while len(self._kept) >= _HEADER_BYTES:
            length = int.from_bytes(self._kept[1:_HEADER_BYTES], "little")
            if self._kept[:1] != PROGRESS or length > _MAX_PROGRESS_BYTES:
                self._is_over = True
                self._kept.clear()
                return
            stop = _HEADER_BYTES + length + _SUM_BYTES
            if len(self._kept) < stop:
                return
            self._on_progress(bytes(self._kept[_HEADER_BYTES : stop - _SUM_BYTES]))
            del self._kept[:stop]
