"""A client of the distribution API: manifests, blobs and tags of one repository.

Blobs are streamed, and what is read is proven by its digest before the reader sees the end of it. Requests that change
nothing when they are repeated are: all of them, since blobs and manifests are named by their content.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from builder.errors import RegistryLostError, RegistryRefusedError
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.registry.documents import MANIFEST_LIMIT, MANIFESTS, StoredManifest, digest_of, json_object
from builder.registry.exchange import Answer, Body, origin
from builder.registry.failures import TransientError
from builder.registry.reference import DIGEST, Reference, is_tag
from builder.registry.transport import Access, Transport
from builder.text import printable, shortened

#: Bytes of one page of tags, and how many pages and tags are read.
_TAGS_LIMIT, _MOST_PAGES, _MOST_TAGS = 4 << 20, 1000, 200_000
#: Requests in a row for a blob that give no byte of it.
_READS = 5

#: Answers to a request for referrers: 200, and those of registries without that API.
_REFERRERS = (200, 400, 403, 404, 405, 406, 410, 415, 501)

Progress = Callable[[int], None]


def _ignored(_: int) -> None:
    """Take no notice of progress."""


class RegistryClient:
    """One repository of one registry. A context manager. May be used by several threads at once.

    reference: names the repository; its tag and digest are not used here.
    insecure, ca_file, deadline, cancel: as in `Access`.

    Every method raises RegistryLostError (cannot be reached, or stopped answering, after retries), RegistryRefusedError
    (with the status of HTTP, or 0 for an answer that is not believed) and, after a signal, Interrupted.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        insecure: bool = False,
        ca_file: Path | None = None,
        deadline: Deadline | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        self.reference = reference
        access = Access(insecure, ca_file, deadline or Deadline(None), cancel)
        self._transport = Transport(reference, access)
        self._path = f"v2/{reference.repository}"
        self._reading = f"repository:{reference.repository}:pull"
        self._writing = f"repository:{reference.repository}:pull,push"

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the connections."""
        self._transport.close()

    # --- manifests ----------------------------------------------------------------------------------------------------

    def get_manifest(self, reference: str) -> StoredManifest:
        """Return the manifest of a tag or digest. Its digest is computed, and compared with all that name it."""
        what = f"read the manifest {self._shown(reference)}"

        def attempt() -> StoredManifest:
            with self._transport.send(
                "GET",
                f"{self._path}/manifests/{reference}",
                scope=self._reading,
                what=what,
                expected=(200,),
                headers={"Accept": ", ".join(MANIFESTS)},
                name=self._shown(reference),
            ) as answer:
                raw = answer.read(MANIFEST_LIMIT, "a manifest")
                length = answer.length()
                if length is not None and len(raw) < length:
                    raise TransientError(f"{self.reference.host} cut the manifest short")
                digest = digest_of(raw)
                claimed = reference if DIGEST.fullmatch(reference) else answer.headers.get("Docker-Content-Digest", "")
                # A digest of another algorithm cannot be compared; the one that counts is computed.
                if claimed.startswith("sha256:") and claimed != digest:
                    raise RegistryRefusedError(
                        f"{self.reference.name} served a manifest with digest {digest} as {printable(claimed[:80])}: "
                        "the registry's data is damaged, or something between changes it"
                    )
                return StoredManifest(raw, digest, _media_type(answer))

        return self._transport.retry(attempt, what)

    def find_manifest(self, reference: str) -> StoredManifest | None:
        """Return the manifest of a tag or digest; None where the registry has none (404)."""
        try:
            return self.get_manifest(reference)
        except RegistryRefusedError as error:
            if error.status != 404:
                raise
            return None

    def put_manifest(self, raw: bytes, media_type: str, reference: str | None = None) -> str:
        """Store a manifest under a tag, or under its digest alone (None); return its digest."""
        digest = digest_of(raw)
        if len(raw) > MANIFEST_LIMIT:
            raise RegistryRefusedError(f"the manifest has {len(raw)} bytes: registries take {MANIFEST_LIMIT}")
        what = f"store the manifest {self._shown(reference or digest)}"

        def attempt() -> str:
            with self._transport.send(
                "PUT",
                f"{self._path}/manifests/{reference or digest}",
                scope=self._writing,
                what=what,
                expected=(200, 201, 202),
                headers={"Content-Type": media_type},
                body=raw,
            ) as answer:
                stored = answer.headers.get("Docker-Content-Digest", digest)
                if stored.startswith("sha256:") and stored != digest:
                    raise RegistryRefusedError(f"{self.reference.name} stored another manifest than was sent")
                return digest

        return self._transport.retry(attempt, what)

    def tags(self, prefix: str = "") -> tuple[str, ...]:
        """Return the repository's tags that begin with a prefix, sorted; those of a repository without any: none.

        A repository that does not exist raises RegistryRefusedError with status 404.
        """
        found: set[str] = set()
        path: str | None = f"{self._path}/tags/list?n=1000"
        for _ in range(_MOST_PAGES):
            if path is None or len(found) > _MOST_TAGS:
                break
            names, path = self._page(path)
            found.update(name for name in names if name.startswith(prefix))
        return tuple(sorted(found))

    def _page(self, path: str) -> tuple[list[str], str | None]:
        """Return the tags of one page, and where the next one is."""
        what = f"list the tags of {self.reference.name}"

        def attempt() -> tuple[list[str], str | None]:
            with self._transport.send(
                "GET",
                path,
                scope=self._reading,
                what=what,
                expected=(200,),
                name=f"repository {self.reference.repository}",
            ) as answer:
                document = json_object(answer.read(_TAGS_LIMIT, "a list of tags"), "the list of tags")
                tags = document.get("tags", "")
                if tags is not None and not isinstance(tags, list):
                    raise RegistryRefusedError(f"{self.reference.host}: the list of tags is none")
                names = [name for name in tags or () if isinstance(name, str) and is_tag(name)]
                return names, self._next(answer)

        return self._transport.retry(attempt, what)

    def _next(self, answer: Answer) -> str | None:
        """Return the address of the next page, which has to be at the same registry; None after the last one."""
        found = re.match(r"\s*<([^<>]*)>\s*;[^<>]*\brel=\"?next\b", answer.headers.get("Link", ""))
        if not found:
            return None
        url: str = urllib.parse.urljoin(answer.url, found[1])
        if origin(url) != origin(self._transport.base()):
            raise RegistryRefusedError(f"{self.reference.host} continues its list of tags at another host")
        return url

    # --- blobs --------------------------------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> int | None:
        """Return the size of a blob that the repository has; None where it has none. 0 where no size is given."""
        what = f"look for the blob {self._shown(digest)}"

        def attempt() -> int | None:
            with self._transport.send(
                "HEAD", f"{self._path}/blobs/{digest}", scope=self._reading, what=what, expected=(200, 404)
            ) as answer:
                return None if answer.status == 404 else answer.length() or 0

        return self._transport.retry(attempt, what)

    def put_blob(
        self,
        digest: str,
        size: int,
        open_stream: Callable[[], Iterable[bytes]],
        progress: Progress = _ignored,
        *,
        mount_from: str | None = None,
    ) -> int:
        """Store a blob unless the repository has it; return the bytes that were sent for it (0 if it was there).

        open_stream: gives the blob's bytes from the start; called again for each attempt, because no registry takes up
        a broken upload reliably.
        progress: called with the size of each piece sent, in another thread; negative where an attempt starts anew.
        mount_from: another repository of the registry that may have the blob.
        """
        if self.has_blob(digest) is not None:
            return 0
        what = f"store the blob {self._shown(digest)}"

        failed = False

        def attempt() -> int:
            nonlocal failed
            if failed and self.has_blob(digest) is not None:  # it was stored, and the answer was lost
                progress(size)
                return size
            failed = True
            location = self._start_upload(digest, mount_from, what)
            if location is None:
                return 0
            body = Body(open_stream(), size, progress)
            try:
                self._finish_upload(location, digest, body, what)
            except BaseException:
                progress(-body.reported)
                raise
            return size

        return self._transport.retry(attempt, what)

    def _start_upload(self, digest: str, mount_from: str | None, what: str) -> str | None:
        """Return the address that takes the blob; None where it was mounted from the other repository."""
        query, scope = "", self._writing
        if mount_from:
            query = "?" + urllib.parse.urlencode({"mount": digest, "from": mount_from})
            scope = f"{scope} repository:{mount_from}:pull"
        with self._transport.send(
            "POST", f"{self._path}/blobs/uploads/{query}", scope=scope, what=what, expected=(201, 202), body=b""
        ) as answer:
            if answer.status == 201:
                return None
            location = answer.headers.get("Location")
            if not location:
                raise RegistryRefusedError(f"{self.reference.host} does not say where it takes the blob")
            return self._transport.allowed(urllib.parse.urljoin(answer.url, location))

    def _finish_upload(self, location: str, digest: str, body: Body, what: str) -> None:
        parts = urllib.parse.urlsplit(location)
        query = "&".join(filter(None, (parts.query, urllib.parse.urlencode({"digest": digest}))))
        with self._transport.send(
            "PUT",
            parts._replace(query=query).geturl(),
            scope=self._writing,
            what=what,
            expected=(201, 204),
            headers={"Content-Type": "application/octet-stream"},
            body=body,
        ):
            pass

    def read_blob(self, digest: str, size: int, progress: Progress = _ignored) -> Iterator[bytes]:
        """Yield a blob's bytes. Only its end proves them: until then they must not be used for anything.

        Resumes where a connection broke. Raises RegistryRefusedError for a blob of another size or digest.
        """
        seen, done, failures = hashlib.sha256(), 0, 0
        what = f"read the blob {self._shown(digest)}"
        while done < size or (size == 0 and not failures):
            before = done
            try:
                for piece in self._pieces(digest, size, done, what):
                    done += len(piece)
                    if done > size:
                        raise self._damaged(digest, f"has more than its {size} bytes")
                    seen.update(piece)
                    progress(len(piece))
                    yield piece
                if done < size:
                    raise TransientError(f"{self.reference.host} ended after {done} of {size} bytes")
                break
            except TransientError as error:
                failures = failures + 1 if done == before else 1
                if failures >= _READS:
                    raise RegistryLostError(f"cannot {what}: {error}") from None
                self._transport.pause(failures)
        if f"sha256:{seen.hexdigest()}" != digest:
            raise self._damaged(digest, "has another digest")

    def _pieces(self, digest: str, size: int, start: int, what: str) -> Iterator[bytes]:
        """Yield the blob's bytes from `start` on, in one request. Raises TransientError where it breaks."""

        def attempt() -> Answer:
            return self._transport.send(
                "GET",
                f"{self._path}/blobs/{digest}",
                scope=self._reading,
                what=what,
                expected=(200, 206) if start else (200,),
                headers={"Range": f"bytes={start}-"} if start else {},
                name=f"blob {self._shown(digest)}",
            )

        with self._transport.retry(attempt, what) as answer:
            skip = start
            if answer.status == 206:
                if not re.match(rf"bytes {start}-", answer.headers.get("Content-Range", "")):
                    raise RegistryRefusedError(
                        f"{self.reference.host} served another part of a blob than the one wanted"
                    )
                skip = 0
            elif (length := answer.length()) is not None and length != size:
                raise self._damaged(digest, f"has {length} bytes instead of {size}")
            for piece in answer.chunks():
                if skip >= len(piece):
                    skip -= len(piece)
                elif skip:
                    yield piece[skip:]
                    skip = 0
                else:
                    yield piece

    def read_small_blob(self, digest: str, size: int, limit: int) -> bytes:
        """Return a whole blob, proven. Raises RegistryRefusedError for one of more than `limit` bytes."""
        if size > limit:
            raise RegistryRefusedError(f"{self._shown(digest)} has {size} bytes: more than {limit} are not read")
        return b"".join(self.read_blob(digest, size))

    def referrers(self, digest: str) -> StoredManifest | None:
        """Return the index of manifests that refer to this one; None where there is none.

        By the referrers API, or where the registry has none by the tag that clients keep in its place.
        """
        what = f"look for what refers to {self._shown(digest)}"

        def attempt() -> StoredManifest | None:
            with self._transport.send(
                "GET", f"{self._path}/referrers/{digest}", scope=self._reading, what=what, expected=_REFERRERS
            ) as answer:
                if answer.status != 200:
                    return None
                raw = answer.read(MANIFEST_LIMIT, "a list of referrers")
                return StoredManifest(raw, digest_of(raw), _media_type(answer))

        found = self._transport.retry(attempt, what)
        return found if found is not None else self.find_manifest(digest.replace(":", "-", 1))

    def _damaged(self, digest: str, how: str) -> RegistryRefusedError:
        return RegistryRefusedError(
            f"{self.reference.name}: the blob {self._shown(digest)} {how}: the registry's data is damaged, or "
            "something between changes it. Nothing of it was used"
        )

    def _shown(self, reference: str) -> str:
        shown = reference[:19] + "…" if DIGEST.fullmatch(reference) else printable(shortened(reference, 128))
        return f"{self.reference.repository}{'@' if ':' in shown else ':'}{shown}"


def _media_type(answer: Answer) -> str:
    return answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
